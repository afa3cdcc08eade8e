"""The packed linear: what ``pack`` writes, the loader rebuilds and the runtime calls.

Letters: M rows, N outputs of all consumers, K main-branch width, D channels, R protected, G groups.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .spec import QuantSpec
from .transform_quantize import quantize_rows, transform
from .w4a4_linear import w4a4_linear
from .w4a16_linear import w4a16_linear


class QuantLinear(nn.Module):
    """All linears that read one site, as one wide packed linear (docs/method.md M1, M2).

    Buffers (portable layout, the same on disk and in ``state_dict``; absent ones are None):

    qweight  uint8, [N, K // 2], layout L1
    wscale   bf16, [N, G]
    basis    bf16, [D, R], the protected directions P
    rotation bf16, [D, K], the dense rotation of the rest; transform ``dense`` only
    wp       bf16, [N, R], the protected columns W P
    bias     bf16, [N]

    Outputs have the input's dtype.
    """

    qweight: Tensor
    wscale: Tensor
    basis: Tensor | None
    rotation: Tensor | None
    wp: Tensor | None
    bias: Tensor | None

    def __init__(self, spec: QuantSpec, *, bias: bool, device: Any = None) -> None:
        super().__init__()
        self.spec = spec
        for name, shape in buffer_shapes(spec, bias=bias).items():
            dtype = torch.uint8 if name == "qweight" else torch.bfloat16
            empty = None if shape is None else torch.empty(shape, dtype=dtype, device=device)
            self.register_buffer(name, empty)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., N], every consumer's outputs side by side."""
        return self.rows(x, slice(None))

    def rows(self, x: Tensor, rows: slice) -> Tensor:
        """The outputs ``rows`` of :meth:`forward`, computed alone."""
        spec = self.spec
        flat = x.reshape(-1, spec.dim)
        z, c = transform(flat, self.basis, self.rotation, spec)
        qweight, wscale = self.qweight[rows], self.wscale[rows]
        wp = None if self.wp is None else self.wp[rows]
        bias = None if self.bias is None else self.bias[rows]
        if spec.act_bits == 16:
            y = w4a16_linear(z, qweight, wscale, bias)
            if c is not None and wp is not None:
                y = y + c.float() @ wp.float().mT
        else:
            y = w4a4_linear(*quantize_rows(z, spec), c, qweight, wscale, wp, bias)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantLinear":
        # Moving a model to a compute dtype must not re-round scales and bases: only devices change.
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                cast = moved.dtype != buffer.dtype
                self._buffers[name] = buffer.to(moved.device) if cast else moved
        return self

    def extra_repr(self) -> str:
        s = self.spec
        return (
            f"{s.dim} -> {list(s.rows)}, W{s.weight_bits}A{s.act_bits}, r={s.rank}, {s.transform}"
        )


class SiteView(nn.Module):
    """One consumer of a shared site: rows of the site's wide linear, without state of its own."""

    site: Any

    def __init__(self, site: nn.Module, rows: slice) -> None:
        super().__init__()
        # Not a submodule: the site's tensors appear once in the state dict, under the site's name.
        object.__setattr__(self, "site", site)
        self.output_rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return self.site.rows(x, self.output_rows)

    def extra_repr(self) -> str:
        return f"rows {self.output_rows.start}:{self.output_rows.stop} of the site"


def buffer_shapes(spec: QuantSpec, *, bias: bool) -> dict[str, tuple[int, ...] | None]:
    """Shape of every buffer of a packed linear; None for one it doesn't have."""
    n, k, r = spec.outputs, spec.width, spec.rank
    return {
        "qweight": (n, k // 2),
        "wscale": (n, k // spec.weight_group_size),
        "basis": (spec.dim, r) if r else None,
        "rotation": (spec.dim, k) if spec.transform == "dense" else None,
        "wp": (n, r) if r else None,
        "bias": (n,) if bias else None,
    }
