"""Shapes of the sweeps (sweeps.py): rows, columns, warps and stages, by prologue and chip."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import triton
from torch import Tensor

from ..build import shared_bytes
from ..chip import processors
from ..formats.spec import QuantSpec
from ..prologue import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Launch shape: rows and columns per step, warps, pipeline stages, programs per SM."""

    bm: int
    width: int = 0
    """Columns: of a step of ``project``, of a program of ``round_rows``. ``rotate``: four tiles."""
    warps: int = 4
    stages: int = 3
    per_sm: int = 1
    stacked: bool = False
    """``rotate``: the four tiles of x are one product's rows (sweeps.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweeps:
    project: Sweep
    rotate: Sweep
    round_rows: Sweep


_STACKED = Sweep(bm=64, stages=2, per_sm=2, stacked=True)

DEFAULT: Mapping[Kind, Sweeps] = {
    "plain": Sweeps(
        project=Sweep(bm=64, width=64, stages=5, per_sm=2),
        rotate=_STACKED,
        round_rows=Sweep(bm=4, width=512),
    ),
    "gelu": Sweeps(
        project=Sweep(bm=64, width=64, stages=4, per_sm=3),
        rotate=_STACKED,
        round_rows=Sweep(bm=4, width=512),
    ),
    "concat": Sweeps(
        project=Sweep(bm=64, width=64, stages=4, per_sm=3),
        rotate=_STACKED,
        round_rows=Sweep(bm=4, width=512),
    ),
}
"""On Hopper, by what the sweeps compute on the way in; measured on an H100 and an H200 at FLUX's
sizes."""

_WARPS = Sweeps(
    project=Sweep(bm=64, width=64, stages=3, per_sm=2),
    rotate=Sweep(bm=64, stages=1, per_sm=2),
    round_rows=Sweep(bm=4, width=512),
)
"""Where a product is a warp's: rows fill the warps, or each would compute GELU for all columns."""

_BLACKWELL = replace(_WARPS, project=replace(_WARPS.project, bm=32), rotate=Sweep(bm=64, stages=2))
_BLACKWELL_PLAIN = replace(_BLACKWELL, rotate=Sweep(bm=32, stages=2, per_sm=3))


def usual(kind: Kind, chip: int | None) -> Sweeps:
    """The sweeps of a prologue on compute capability ``chip``: on others than Hopper, by what their
    machine code shows."""
    if chip in (None, 90):
        return DEFAULT[kind]
    if chip == 100:
        return _BLACKWELL_PLAIN if kind == "plain" else _BLACKWELL
    return _WARPS


def parts(x_BTD: Tensor, d: int, s: Sweep) -> tuple[int, int]:
    """Into how many parts of how many columns ``project`` is cut, so that it fills the chip."""
    programs = x_BTD.shape[0] * triton.cdiv(x_BTD.shape[1], s.bm)
    steps = triton.cdiv(d, s.width)
    wanted = processors(x_BTD.device) * s.per_sm // max(programs, 1)
    part = triton.cdiv(steps, max(1, min(wanted, steps // 3)))
    return triton.cdiv(steps, part), part * s.width


def tile(spec: QuantSpec) -> int:
    """Columns of a tile of ``rotate``."""
    return 128 if spec.transform.block == 512 else 64


def tiles(spec: QuantSpec) -> int:
    """Tiles of the main branch."""
    return triton.cdiv(spec.in_features, tile(spec))


def width_of_c(rank: int) -> int:
    """Columns of c and of the basis in the kernels: a power of two."""
    return max(16, triton.next_power_of_2(rank))


def project_sweep(sweeps: Sweeps, rank: int, chip: int) -> Sweep:
    """``project``'s, with as many stages as the chip's shared memory holds."""
    s = sweeps.project
    return _stages_within(s, 2 * s.width * (s.bm + width_of_c(rank)), 0, chip)


def rotate_sweep(sweeps: Sweeps, block: int, rank: int, chip: int) -> Sweep:
    """``rotate``'s, the same."""
    s, w, rp = sweeps.rotate, 64, width_of_c(rank) if rank else 0
    if block == 512:  # tiles are twice as wide: the same registers for twice the threads
        s, w = replace(s, warps=2 * s.warps, stacked=False), 128
    return _stages_within(s, 2 * s.bm * (4 * w + rp), 2 * w * (4 * rp + w), chip)


def _stages_within(s: Sweep, each: int, fixed: int, chip: int) -> Sweep:
    """``s`` with as many of its stages (``each`` bytes) as fit beside ``fixed`` bytes."""
    return replace(s, stages=max(1, min(s.stages, (shared_bytes(chip) - fixed) // each)))


def warps_of_row(width: int) -> int:
    """Of a program that holds one row of ``width`` channels, a power of two."""
    return min(16, max(1, width // 1024))


def programs(x: Tensor, n_row: int, n_col: int, sweep: Sweep, block: int) -> int:
    """A multiple of the column blocks that fills the chip, at most one program per row block."""
    slots = processors(x.device) * (1 if block == 512 else sweep.per_sm)
    return n_col * max(1, min(n_row, slots // n_col))
