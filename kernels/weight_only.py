"""A linear whose weights alone are rounded: what a packed text encoder is made of.

Letters: M rows, N outputs, K channels, G groups.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from . import ops
from .formats.activation import recorded_format
from .formats.pack_int4 import pack_int4
from .formats.quantize_weight import codes_on_grid, weight_scales
from .formats.spec import QuantSpec
from .formats.transform import NO_TRANSFORM, PROJECT
from .formats.weight import WeightFormat

Bits = Literal[4, 8]
GROUP = 32
"""Columns that share a scale of 4-bit weights. Groups of 128 have 0.4 bits less, and cost 1 to 2 dB
of the images of the embedded models."""
LARGEST = 127
"""8-bit code: symmetric."""


def takes(module: nn.Module, bits: Bits) -> bool:
    """Tell whether a module is a linear whose weights can be rounded to so many bits."""
    return type(module) is nn.Linear and (bits == 8 or module.in_features % GROUP == 0)


class WeightOnlyLinear(nn.Module):
    """A linear with 4-bit weights in groups, or 8-bit ones in rows, and inputs as they come.

    ``weight``  int8, [N, K] codes; or [N, K // 2], layout L1: two 4-bit codes in a byte
    ``scale``   bf16, [N, G]
    ``bias``    bf16, [N], or None

    transformers asks linears for their ``weight.dtype``, and knows that it casts no input to int8.
    All keep their dtypes wherever the network is moved or cast.
    """

    scale: Tensor
    bias: Tensor | None

    def __init__(self, like: nn.Linear, bits: Bits) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = like.in_features, like.out_features, bits
        self.spec = _spec(like) if bits == 4 else None
        self._key = ops.format_key(self.spec) if self.spec is not None else ""
        self.widens = False
        """Whether float16 inputs become float32: for networks that say so of this linear."""
        columns = self.in_features * bits // 8
        groups = 1 if self.spec is None else self.in_features // GROUP
        on = like.weight.device
        shape = self.out_features, columns
        self.weight = _frozen(torch.empty(shape, dtype=torch.int8, device=on))
        self.scale = _frozen(
            torch.empty(self.out_features, groups, dtype=torch.bfloat16, device=on)
        )
        bias = None
        if like.bias is not None:
            bias = _frozen(torch.empty(self.out_features, dtype=torch.bfloat16, device=on))
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] to [..., N] in x's dtype, or in float32 where it ``widens``."""
        if self.widens and x.dtype == torch.float16:
            x = x.float()
        if self.spec is None:
            # Rounded to x's dtype, as 16-bit weights are.
            weight = self.weight.to(x.dtype).mul_(self.scale.to(x.dtype))
            return linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        y: Tensor = ops.quant_linear(
            x, self.weight.view(torch.uint8), self.scale, None, None, None, None, self.bias,
            self._key,
        )  # fmt: skip
        return y

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # A cast of the network is none of the grid that its codes were rounded on: devices change.
        def moved(tensor: Tensor) -> Tensor:
            after: Tensor = fn(tensor)
            return after if after.dtype == tensor.dtype else tensor.to(after.device)

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, W{self.bits}A16"


def rounded(weight_NK: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Return ``weight`` and ``scale`` of a linear, without data: rounding to the nearest codes.

    weight_NK  floating, [N, K], finite

    4 bits: per group the scale, of nine fractions of the largest weight, that loses least. 8 bits:
    the largest weight of a row.
    """
    weight_NK = weight_NK.float()
    if bits == 4:
        scale = weight_scales(weight_NK, weight_NK.shape[1] // GROUP, clip=True)
        return pack_int4(codes_on_grid(weight_NK, scale)).view(torch.int8), scale
    scale = (weight_NK.abs().amax(1, keepdim=True) / LARGEST).to(torch.bfloat16)
    codes = torch.where(scale > 0, weight_NK / scale.float(), 0.0).round_()
    return codes.clamp_(-LARGEST, LARGEST).to(torch.int8), scale


def _spec(like: nn.Linear) -> QuantSpec:
    return QuantSpec(
        in_features=like.in_features,
        out_features=(like.out_features,),
        rank=0,
        transform=NO_TRANSFORM,
        branch=PROJECT,
        weights=WeightFormat(element="int4", granularity="group", scale="bf16", group=GROUP),
        activations=recorded_format(16, "token", GROUP),
    )


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
