"""Launch shapes of the passes (passes.py): rows, warps and stages, by prologue and chip."""

from dataclasses import dataclass, replace

import triton
from torch import Tensor

from ..build import CHIPS, shared_bytes
from ..chip import processors
from ..formats.spec import QuantSpec
from ..prologue import Kind

STEP = 64
"""Channels of a step of ``project``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Rows per step, warps, pipeline stages, programs per multiprocessor."""

    bm: int = 64
    warps: int = 4
    stages: int
    per_sm: int = 1
    stacked: bool = False
    """``rotate``: the four tiles of x are one product's rows (passes.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    project: Shape
    rotate: Shape


_STACKED = Shape(stages=2, per_sm=2, stacked=True)
_HOPPER_PLAIN = Shapes(project=Shape(stages=5, per_sm=2), rotate=_STACKED)
_HOPPER = Shapes(project=Shape(stages=4, per_sm=3), rotate=_STACKED)
"""With GELU on the way in. Measured on an H100 and an H200 at FLUX's sizes."""

_WARPS = Shapes(project=Shape(stages=3, per_sm=2), rotate=Shape(stages=1, per_sm=2))
"""Where a product is a warp's: rows fill the warps, or each would compute GELU for all columns."""

_BLACKWELL = Shapes(project=Shape(bm=32, stages=3, per_sm=2), rotate=Shape(stages=2))
_BLACKWELL_PLAIN = replace(_BLACKWELL, rotate=Shape(bm=32, stages=2, per_sm=3))


def usual(kind: Kind, chip: int | None) -> Shapes:
    """Return the shapes for a prologue on compute capability ``chip``: on others than Hopper, by
    what their machine code shows."""
    if chip in (None, 90):
        return _HOPPER_PLAIN if kind == "plain" else _HOPPER
    if chip == 100:
        return _BLACKWELL_PLAIN if kind == "plain" else _BLACKWELL
    return _WARPS


def project_shape(shapes: Shapes, rank: int, chip: int | None) -> Shape:
    """Return ``project``'s, with as many stages as the chip's shared memory holds."""
    s = shapes.project
    return _stages_within(s, 2 * STEP * (s.bm + width_of_c(rank)), 0, chip)


def rotate_shape(shapes: Shapes, block: int, rank: int, chip: int | None) -> Shape:
    """Return ``rotate``'s, likewise."""
    s, w, rp = shapes.rotate, 64, width_of_c(rank) if rank else 0
    if block == 512:  # tiles are twice as wide: the same registers for twice the threads
        s, w = replace(s, warps=2 * s.warps, stacked=False), 128
    return _stages_within(s, 2 * s.bm * (4 * w + rp), 2 * w * (4 * rp + w), chip)


def _stages_within(s: Shape, each: int, fixed: int, chip: int | None) -> Shape:
    """Return ``s`` with as many of its stages (``each`` bytes) as fit beside ``fixed`` bytes."""
    room = shared_bytes(chip or CHIPS[-1]) - fixed
    return replace(s, stages=max(1, min(s.stages, room // each)))


def parts(x_BTD: Tensor, d: int, s: Shape) -> tuple[int, int]:
    """Return into how many parts of how many columns ``project`` is cut, so as to fill the chip."""
    programs = x_BTD.shape[0] * triton.cdiv(x_BTD.shape[1], s.bm)
    steps = triton.cdiv(d, STEP)
    wanted = processors(x_BTD.device) * s.per_sm // max(programs, 1)
    part = triton.cdiv(steps, max(1, min(wanted, steps // 3)))
    return triton.cdiv(steps, part), part * STEP


def programs(x: Tensor, n_row: int, n_col: int, s: Shape, block: int) -> int:
    """Count ``rotate``'s: a multiple of the column blocks that fills the chip, at most one program
    per row block."""
    slots = processors(x.device) * (1 if block == 512 else s.per_sm)
    return n_col * max(1, min(n_row, slots // n_col))


def tile(spec: QuantSpec) -> int:
    """Return the columns of a tile of ``rotate``."""
    return 128 if spec.transform.block == 512 else 64


def tiles(spec: QuantSpec) -> int:
    """Count the tiles of the main branch."""
    return triton.cdiv(spec.in_features, tile(spec))


def width_of_c(rank: int) -> int:
    """Return the columns of c and of the basis in the kernels: a power of two."""
    return max(16, triton.next_power_of_2(rank))


def warps_of_row(width: int) -> int:
    """Return the warps of a program that holds one row of ``width`` channels, a power of two."""
    return min(16, max(1, width // 1024))
