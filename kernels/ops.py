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
from .plan import choose
from .prologue import Prologue, kind_of

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


@torch.library.custom_op("dirotq::quant_linear", mutates_args=())
def quant_linear(
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
) -> Tensor:
    """Return y [..., N] of x [..., D]; tensors as :class:`.buffers.Packed` describes them.

    rows      first output and the one after the last; None: all
    prologue  what happens to x first (kernels/prologue.py)
    behind    [..., F], of ``concat``: D + F channels are read

    Exported graphs know the order of the arguments.
    """
    packed = Packed(qweight, wscale, wglobal, basis, rotation, smooth, wp, wpscale, bias)
    if rows is not None:
        packed = packed.rows(slice(*rows))
    outputs = len(packed.qweight)
    more = None if behind is None else _images(behind)
    read = Prologue(kind=kind_of(prologue), x_BTD=_images(x), behind_BTF=more)
    if read.rows == 0:
        return x.new_empty((*x.shape[:-1], outputs))
    known = spec_of(spec, read.channels, outputs, packed.rank)
    plan = choose(capability(x.device), read.rows, outputs, known, x.dtype)
    return engine.linear(plan, read, packed, known).view(*x.shape[:-1], outputs)


@quant_linear.register_fake
def _(
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
) -> Tensor:
    outputs = wscale.shape[0] if rows is None else rows[1] - rows[0]
    return x.new_empty((*x.shape[:-1], outputs))


def _images(x: Tensor) -> Tensor:
    """View x [..., D] as [B, T, D]."""
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
