"""Modules whose weights alone are rounded: what a packed text encoder is made of.

Letters: M rows, N outputs (of an embedding: tokens), K channels, G groups.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from . import ops
from .formats.activation import recorded_format
from .formats.quantize_weight import codes_on_grid, pack_codes, weight_scales, weight_steps
from .formats.spec import QuantSpec
from .formats.transform import NO_TRANSFORM, PROJECT
from .formats.weight import Element, WeightFormat
from .gptq import gptq

Bits = Literal[4, 8]
LEAST = 32
"""Columns of the smallest group of 4-bit weights: what the kernels can read."""
GROUPS: dict[Element, int] = {"int4": 32, "lm4": 64}
"""Columns that share a scale, by what a code is; ``int4`` is what the first packed encoders have.
Groups of levels are of LEAST columns where 64 don't divide a row."""
LARGEST = 127
"""8-bit code: symmetric."""
PART = 1 << 28
"""Numbers of an 8-bit weight that a product widens at a time, 0.5 GB in 16 bits; a sixteenth of
them is rounded at a time. Embeddings, and heads that share their weights, have more."""
SCALED = ("GemmaTextScaledWordEmbedding", "Gemma2TextScaledWordEmbedding",
          "Gemma3TextScaledWordEmbedding")  # fmt: skip
"""Classes of transformers that multiply what they look up by ``scalar_embed_scale``, and whose
networks read no weights but through them (Gemma 4 does)."""
DAMPING = 0.01
"""Share of the mean diagonal that GPTQ adds to a second moment; of few rows, FEW times that."""
FEW = 10
"""Measured on the embedded models' encoders with rows for a third of the channels: 0.3 to 1.3 dB
of the embeddings."""


def takes(module: nn.Module, bits: Bits) -> bool:
    """Tell whether a module is a linear whose weights can be rounded to so many bits."""
    return type(module) is nn.Linear and (bits == 8 or module.in_features % LEAST == 0)


def takes_embedding(module: nn.Module) -> bool:
    """Tell whether a module is an embedding of tokens whose weights can be rounded to 8 bits."""
    plain = type(module) is nn.Embedding or type(module).__name__ in SCALED
    return plain and module.max_norm is None  # which would write to the weights


class WeightOnlyLinear(nn.Module):
    """A linear with 4-bit weights in groups, or 8-bit ones in rows, and inputs as they come.

    ``element``  what a 4-bit code is: a level (``lm4``) or an integer (``int4``)

    ``weight``  int8, [N, K] codes; or [N, K // 2], layout L1: two 4-bit codes in a byte
    ``scale``   bf16, [N, G]
    ``bias``    bf16, [N], or None

    transformers asks linears for their ``weight.dtype``, and knows that it casts no input to int8.
    All keep their dtypes wherever the network is moved or cast.
    """

    scale: Tensor
    bias: Tensor | None

    def __init__(self, like: nn.Linear, bits: Bits, element: Element = "lm4") -> None:
        nn.Module.__init__(self)  # of a subclass that is a linear too
        self.in_features, self.out_features, self.bits = like.in_features, like.out_features, bits
        self.spec = _spec(like, element) if bits == 4 else None
        self._key = ops.format_key(self.spec) if self.spec is not None else ""
        self.widens = False
        """Whether float16 inputs become float32: for networks that say so of this linear."""
        columns = self.in_features * bits // 8
        groups = 1 if self.spec is None else self.in_features // self.spec.weights.group
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
            rows = max(PART // self.in_features, 1)
            starts = range(0, self.out_features, rows)
            made = [self._product(x, slice(start, start + rows)) for start in starts]
            return made[0] if len(made) == 1 else torch.cat(made, -1)
        y: Tensor = ops.quant_linear(
            x, self.weight.view(torch.uint8), self.scale, None, None, None, None, self.bias,
            self._key,
        )  # fmt: skip
        return y

    def _product(self, x: Tensor, rows: slice) -> Tensor:
        weight = widened(self.weight[rows], self.scale[rows], x.dtype)
        return linear(x, weight, None if self.bias is None else self.bias[rows].to(x.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # A cast of the network is none of the grid that its codes were rounded on: devices change.
        def moved(tensor: Tensor) -> Tensor:
            after: Tensor = fn(tensor)
            return after if after.dtype == tensor.dtype else tensor.to(after.device)

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, W{self.bits}A16"


class SharedHead(WeightOnlyLinear, nn.Linear):  # type: ignore[misc]
    """An 8-bit linear with the weights of an embedding. diffusers' group offloading brings tensors
    that modules share to linears and embeddings alone, by their class."""


class WeightOnlyEmbedding(nn.Embedding):
    """An embedding of tokens with 8-bit weights in rows, widened as they are looked up.

    ``weight``  int8, [N, K] codes
    ``scale``   [N, 1], in the dtype that is computed in, which casts of the network change: a
                network says its dtype by its first floating tensor, which this often is

    Both are those of an 8-bit :class:`WeightOnlyLinear`, which can share them. By class it is an
    embedding for the reason that :class:`SharedHead` is a linear.
    """

    scale: Tensor
    max_norm = None

    def __init__(self, like: nn.Embedding) -> None:
        nn.Module.__init__(self)  # no 16-bit weights
        self.num_embeddings, self.embedding_dim = like.num_embeddings, like.embedding_dim
        self.padding_idx = like.padding_idx
        self.factor: float | None = getattr(like, "scalar_embed_scale", None)
        """What rows are multiplied by, of a class in SCALED."""
        on, rows = like.weight.device, self.num_embeddings
        self.weight = _frozen(torch.empty(rows, self.embedding_dim, dtype=torch.int8, device=on))
        self.scale = _frozen(torch.empty(rows, 1, dtype=like.weight.dtype, device=on))

    def forward(self, input: Tensor) -> Tensor:
        """Map tokens, integers [...], to rows [..., K] in the dtype of ``scale``."""
        dtype = self.scale.dtype
        rows = widened(self.weight[input], self.scale[input], dtype)
        return rows if self.factor is None else rows * torch.tensor(self.factor, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings} x {self.embedding_dim}, W8"


def widened(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of 8-bit codes [..., K] with scales [..., 1], rounded to ``dtype`` as
    16-bit weights are."""
    return codes.to(dtype).mul_(scale.to(dtype))


def rounded(
    weight_NK: Tensor, bits: Bits, moment_KK: Tensor | None = None, rows: int = 0
) -> tuple[Tensor, Tensor]:
    """Return ``weight`` and ``scale`` of a linear: levels in 4 bits, integers in 8.

    weight_NK  floating, [N, K], finite
    moment_KK  floating, [K, K], the second moment of the linear's inputs, or None
    rows       that it is of

    8 bits: the nearest codes, scaled to the largest weight of a row. 4 bits: per group the scale,
    of fourteen fractions of the largest weight, that loses least of the weights; on that grid the
    nearest codes, or, with the moment, those of GPTQ.

    Raises FactorizationError (kernels/gptq) for a moment that is not one.
    """
    width = weight_NK.shape[1]
    if bits == 8:
        parts = [_integers(part) for part in weight_NK.split(max(PART // 16 // width, 1))]
        codes, scale = (torch.cat(each) for each in zip(*parts, strict=True))
        return codes, scale
    weight_NK = weight_NK.float()
    scale = weight_scales(weight_NK, width // _group(width, "lm4"), clip=True, element="lm4")
    step = weight_steps(scale, None, "lm4")
    if moment_KK is None:
        codes = codes_on_grid(weight_NK, step, "lm4")
    else:
        damping = DAMPING * (FEW if rows < 2 * width else 1)
        codes, _ = gptq(weight_NK, moment_KK.double(), step, damping=damping, element="lm4")
    return pack_codes(codes, "lm4").view(torch.int8), scale


def _integers(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    weight_NK = weight_NK.float()
    scale = (weight_NK.abs().amax(1, keepdim=True) / LARGEST).to(torch.bfloat16)
    codes = torch.where(scale > 0, weight_NK / scale.float(), 0.0).round_()
    return codes.clamp_(-LARGEST, LARGEST).to(torch.int8), scale


def _group(width: int, element: Element) -> int:
    return GROUPS[element] if width % GROUPS[element] == 0 else LEAST


def _spec(like: nn.Linear, element: Element) -> QuantSpec:
    group = _group(like.in_features, element)
    return QuantSpec(
        in_features=like.in_features,
        out_features=(like.out_features,),
        rank=0,
        transform=NO_TRANSFORM,
        branch=PROJECT,
        weights=WeightFormat(element=element, granularity="group", scale="bf16", group=group),
        activations=recorded_format(16, "token", group),
    )


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
