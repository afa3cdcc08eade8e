"""``torch.ops.dirotq.quant_linear``: a packed linear as one operator.

One operator, so that the plan is chosen when it runs, by the rows it then has: ``torch.compile``
sees a single node whatever M is, and a CUDA graph captures the kernels that were chosen.
"""

import functools
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from . import engine
from .buffers import Packed
from .chip import capability
from .formats.spec import QuantSpec
from .plan import choose, refuse
from .prologue import Prologue, kind_of
from .recorder import recorded

SCHEMA = """(
    Tensor x, Tensor qweight, Tensor wscale, Tensor? wglobal, Tensor? basis, Tensor? rotation,
    Tensor? wp, Tensor? bias, str spec, Tensor? smooth=None, Tensor? wpscale=None,
    SymInt[]? rows=None, str prologue="plain", Tensor? behind=None, Tensor? down=None,
    Tensor? up=None
) -> Tensor"""
"""Return y [..., N] of x [..., D]; tensors as :class:`.buffers.Packed` describes them.

rows      first output and the one after the last; None: all
prologue  what happens to x first (kernels/prologue.py)
behind    [..., F], of ``concat``: D + F channels are read
down, up  further directions, as :class:`.updates.Directions` describes them

Exported graphs know the order of the arguments.
"""

SHAPE = ("dim", "rows", "rank")
"""Fields of a recorded spec that an operator's tensors say."""


def format_key(spec: QuantSpec) -> str:
    """Return a spec but for its shape as an operator's argument: blocks that differ only in rank
    share what was compiled."""
    return json.dumps({k: v for k, v in spec.to_dict().items() if k not in SHAPE})


@functools.lru_cache(maxsize=4096)
def spec_of(key: str, in_features: int, outputs: int, rank: int) -> QuantSpec:
    """Return the spec of one linear of so many inputs and outputs in the format of a key."""
    shape = {"dim": in_features, "rows": (outputs,), "rank": rank}
    return QuantSpec.from_dict(json.loads(key) | shape)


def _linear(
    x: Tensor,
    qweight: Tensor,
    wscale: Tensor,
    wglobal: Tensor | None,
    basis: Tensor | None,
    rotation: Tensor | None,
    wp: Tensor | None,
    bias: Tensor | None,
    spec: str,
    smooth: Tensor | None = None,
    wpscale: Tensor | None = None,
    rows: Sequence[int] | None = None,
    prologue: str = "plain",
    behind: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """Compute the operator; by the next plan, where the kernels of one don't compile."""
    packed = Packed(qweight, wscale, wglobal, basis, rotation, smooth, wp, wpscale, bias)
    beside, apart = 0, down is not None and down.dtype != torch.bfloat16
    if down is not None and not apart:
        beside = down.shape[1] - packed.rank
        packed = packed._replace(basis=down, wp=up)
    y = None
    while y is None:
        try:
            y = _by_recording(x, packed, spec, rows, prologue, behind, beside)
        except _PlanRefused:
            continue
    if not apart or down is None or up is None or not y.numel():
        return y
    read = _read(x, prologue, behind)
    up = up if rows is None else up[slice(*rows)]
    return engine.added(y.flatten(0, -2), read.value().flatten(0, 1), down, up).view(y.shape)


class _PlanRefused(Exception):
    """A plan's kernels did not compile; there is another plan now."""


def _by_recording(
    x: Tensor,
    packed: Packed,
    spec: str,
    rows: Sequence[int] | None,
    prologue: str,
    behind: Tensor | None,
    beside: int,
) -> Tensor:
    """Compute the operator, on a GPU by what was recorded of such a call."""
    if not x.is_cuda or not x.numel():
        return _by_plan(x, packed, spec, rows, prologue, behind, beside)
    # Channels of a convolution's input lie apart; a copy could not be repeated from a recording.
    x = x if x.stride(-1) == 1 else x.contiguous()
    compute = functools.partial(_by_plan, x, packed, spec, rows, prologue, behind, beside)
    for tensor in packed:
        if tensor is not None and not tensor.is_contiguous():
            return compute()
    kind = (
        spec, prologue, None if rows is None else tuple(rows), x.shape, x.stride(), x.dtype,
        x.device, None if behind is None else (behind.shape, behind.stride(), behind.dtype),
        packed.qweight.shape, None if packed.wp is None else packed.wp.shape, beside,
    )  # fmt: skip
    return recorded(kind, (x, behind, *packed), compute)


def _by_plan(
    x: Tensor,
    packed: Packed,
    spec: str,
    rows: Sequence[int] | None,
    prologue: str,
    behind: Tensor | None,
    beside: int = 0,
) -> Tensor:
    """Compute the operator by the plan for so many rows; ``beside`` as :func:`engine.linear`'s
    ``last``."""
    if rows is not None:
        packed = packed.rows(slice(*rows))
    outputs = len(packed.qweight)
    read = _read(x, prologue, behind)
    if read.rows == 0:
        return x.new_empty((*x.shape[:-1], outputs))
    known = spec_of(spec, read.channels, outputs, packed.rank - beside)
    chip = capability(x.device)
    plan = choose(chip, read.rows, outputs, known, x.dtype)
    try:
        wide = spec_of(spec, read.channels, outputs, packed.rank)
        y = engine.linear(plan, read, packed, wide, beside)
        return y.view(*x.shape[:-1], outputs)
    except Exception as error:
        if refuse(chip, known, plan, error):
            raise _PlanRefused from error
        raise


def _fake(
    x: Tensor,
    qweight: Tensor,
    wscale: Tensor,
    wglobal: Tensor | None,
    basis: Tensor | None,
    rotation: Tensor | None,
    wp: Tensor | None,
    bias: Tensor | None,
    spec: str,
    smooth: Tensor | None = None,
    wpscale: Tensor | None = None,
    rows: Sequence[int] | None = None,
    prologue: str = "plain",
    behind: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    outputs = wscale.shape[0] if rows is None else rows[1] - rows[0]
    return x.new_empty((*x.shape[:-1], outputs))


def _read(x: Tensor, prologue: str, behind: Tensor | None) -> Prologue:
    more = None if behind is None else _images(behind)
    return Prologue(kind=kind_of(prologue), x_BTD=_images(x), behind_BTF=more)


def _images(x: Tensor) -> Tensor:
    """View x [..., D] as [B, T, D]."""
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])


# Not ``custom_op``, whose wrapper takes the host longer than all launches.
_LIBRARY = torch.library.Library("dirotq", "FRAGMENT")
_LIBRARY.define(f"quant_linear{SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("quant_linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("dirotq::quant_linear", _fake, lib=_LIBRARY)

quant_linear = torch.ops.dirotq.quant_linear.default
"""y [..., N] of x [..., D]; its other arguments are explained at SCHEMA."""
