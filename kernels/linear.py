"""The packed linear: what ``pack`` writes, the loader rebuilds and the runtime calls.

Letters: M rows, N outputs of all consumers, K main-branch width, D channels, R protected, G groups.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import engine
from .chip import capability
from .formats.spec import QuantSpec
from .ops import quant_linear, spec_key
from .plan import Plan, choose
from .source import Source

WHOLE = slice(None)
"""Every consumer's outputs."""


class QuantLinear(nn.Module):
    """All linears that read one site, as one wide packed linear (docs/method.md M1, M2).

    It is only ever read by a call, ``linear(x, rows=...)``: whatever brings its tensors in for a
    call (accelerate, diffusers), or watches it, wraps the call.

    Tensors (portable layout, the same on disk and in ``state_dict``; absent ones are None). They
    are parameters without gradients, and not buffers, which offloading leaves where they are:

    qweight  uint8, [N, K // 2], layout L1; L2 in the FP4 formats
    wscale   bf16, [N, G]; in the FP4 formats uint8, E4M3 or E8M0
    wglobal  float32, [1], the global scale; ``nvfp4`` only
    basis    bf16, [D, R], the protected directions P
    rotation bf16, [D, K], the dense rotation of the rest; transform ``dense`` only
    smooth   bf16, [D], a factor per channel of the main branch's input; smoothing only
    wp       bf16, [N, R], the protected columns W P; int8 codes if ``spec.branch.bits`` is 8
    wpscale  bf16, [N, 1], the scales of those codes
    bias     bf16, [N]

    Outputs have the input's dtype.
    """

    qweight: Tensor
    wscale: Tensor
    wglobal: Tensor | None
    basis: Tensor | None
    rotation: Tensor | None
    smooth: Tensor | None
    wp: Tensor | None
    wpscale: Tensor | None
    bias: Tensor | None

    def __init__(self, spec: QuantSpec, *, bias: bool, device: Any = None) -> None:
        super().__init__()
        self.spec = spec
        self._key = spec_key(spec)
        for name, shape in buffer_shapes(spec, bias=bias).items():
            dtype = buffer_dtype(spec, name)
            empty = None if shape is None else torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(name, None if empty is None else frozen(empty))

    def forward(self, x: Tensor | Source, rows: slice = WHOLE) -> Tensor:
        """x [..., D] -> [..., N], every consumer's outputs side by side, or ``rows`` of them alone.

        A source is computed by the kernels on the way in, or before where they can't; of it all
        outputs are.

        Raises ValueError if x has another number of channels, is not floating point or lies on
        another device than the packed tensors.
        """
        return self._read(x) if isinstance(x, Source) else self._rows(x, rows)

    def _read(self, source: Source) -> Tensor:
        x = source.x_BTD
        if torch.compiler.is_compiling() or not x.is_cuda or not source.rows:
            return self._rows(source.value(), WHOLE)
        plan = choose(capability(x.device), source.rows, self.spec.outputs, self.spec, x.dtype)
        if plan.engine in ("reference", "w4a16"):
            return self._rows(source.value(), WHOLE)
        y_MN = engine.read(
            plan, source, self.qweight, self.wscale, self.basis, self.rotation, self.wp, self.bias,
            self.spec,
        )  # fmt: skip
        return y_MN.view(*x.shape[:2], -1)

    def _rows(self, x: Tensor, rows: slice) -> Tensor:
        self._check(x)
        wp = None if self.wp is None else self.wp[rows]
        bias = None if self.bias is None else self.bias[rows]
        wpscale = None if self.wpscale is None else self.wpscale[rows]
        return quant_linear(
            x, self.qweight[rows], self.wscale[rows], self.wglobal, self.basis, self.rotation, wp,
            bias, self._key, self.smooth, wpscale,
        )  # fmt: skip

    def plan(self, rows: int, dtype: torch.dtype = torch.bfloat16) -> Plan:
        """Which kernels run a call with so many rows of ``dtype`` where the module now is."""
        return choose(capability(self.qweight.device), rows, self.spec.outputs, self.spec, dtype)

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.spec.dim:
            raise ValueError(
                f"x has {x.shape[-1]} channels {tuple(x.shape)}; this linear takes {self.spec.dim}"
            )
        if x.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise ValueError(f"x is {x.dtype}; use bfloat16, float16 or float32")
        if x.device != self.qweight.device:
            raise ValueError(
                f"x is on {x.device}, the packed weights are on {self.qweight.device}; move one of "
                "them"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Moving a model to a compute dtype must not re-round scales and bases: only devices change.
        def moved(tensor: Tensor) -> Tensor:
            after: Tensor = fn(tensor)
            return after if after.dtype == tensor.dtype else tensor.to(after.device)

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        s = self.spec
        return f"{s.dim} -> {list(s.rows)}, {s.format}, r={s.rank}, {s.transform.kind}"


class SiteView(nn.Module):
    """One consumer of a shared site: rows of the site's wide linear, without state of its own."""

    site: Any

    def __init__(self, site: nn.Module, rows: slice) -> None:
        super().__init__()
        # Not a submodule: the site's tensors appear once in the state dict, under the site's name.
        object.__setattr__(self, "site", site)
        self.output_rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x, rows=self.output_rows)

    def extra_repr(self) -> str:
        return f"rows {self.output_rows.start}:{self.output_rows.stop} of the site"


class PointwiseView(nn.Module):
    """A 1x1 convolution's place: its channels go last, through a linear, and back.

    ``linear``  the site's wide linear, or a :class:`SiteView` of it; no submodule, as there
    """

    linear: Any

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "linear", linear)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, D, ...] -> [B, N, ...], in channels-last memory: tokens stay as they lie there."""
        return self.linear(x.movedim(1, -1)).movedim(-1, 1)


def frozen(tensor: Tensor) -> nn.Parameter:
    """A tensor as a packed linear holds it."""
    return nn.Parameter(tensor, requires_grad=False)


def buffer_shapes(spec: QuantSpec, *, bias: bool) -> dict[str, tuple[int, ...] | None]:
    """Shape of every tensor of a packed linear; None for one it doesn't have."""
    n, k, r = spec.outputs, spec.width, spec.rank
    return {
        "qweight": (n, k // 2),
        "wscale": (n, k // spec.weight_group_size),
        "wglobal": (1,) if spec.weights.name == "nvfp4" else None,
        "basis": (spec.dim, r) if r else None,
        "rotation": (spec.dim, k) if spec.transform.kind == "dense" else None,
        "smooth": (spec.dim,) if spec.transform.smooth else None,
        "wp": (n, r) if r else None,
        "wpscale": (n, 1) if r and spec.branch.bits == 8 else None,
        "bias": (n,) if bias else None,
    }


def buffer_dtype(spec: QuantSpec, name: str) -> torch.dtype:
    """dtype of a packed linear's tensor, in memory and on disk."""
    if name == "qweight" or (name == "wscale" and spec.weights.element == "e2m1"):
        return torch.uint8
    if name == "wp" and spec.branch.bits == 8:
        return torch.int8
    return torch.float32 if name == "wglobal" else torch.bfloat16
