"""How ``fp4_linear`` cuts a product into tiles: what tuning may choose from.

Needs neither triton nor a GPU. Letters: M rows, N outputs, K main-branch width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from . import NATIVE

Variant = Literal["native", "decoded"]
"""FP4 matrix units multiply; or those of 16 bits, after the kernel or Triton decoded numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One launch configuration. A program computes ``bm`` rows x ``bn`` outputs, ``bk`` columns a
    step; ``group_m`` row tiles in turn share the same weights while these are in the L2 cache."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    group_m: int = 8


TILES: Mapping[Variant, tuple[Tile, ...]] = {
    "native": (
        Tile(bm=128, bn=128, bk=256, warps=8, stages=3),
        Tile(bm=256, bn=128, bk=128, warps=8, stages=3),
        Tile(bm=128, bn=128, bk=128, warps=8, stages=4),
        Tile(bm=64, bn=128, bk=256, warps=4, stages=3),
        Tile(bm=16, bn=128, bk=256, warps=4, stages=4),
    ),
    "decoded": (
        Tile(bm=128, bn=128, bk=64, warps=8, stages=3),
        Tile(bm=64, bn=128, bk=64, warps=4, stages=4),
        Tile(bm=64, bn=64, bk=64, warps=4, stages=4),
        Tile(bm=16, bn=64, bk=128, warps=4, stages=4),
    ),
}
"""The configurations worth trying, by what multiplies; :func:`fits` says on which chips. Weights
are the left operand, so that few rows fill a matrix instruction too."""


def variant(chip: int | None) -> Variant:
    """Return what multiplies FP4 by FP4 on a chip (90: 9.0); None: on no NVIDIA GPU."""
    return "native" if chip is not None and chip >= NATIVE[0] else "decoded"


def fits(tile: Tile, kind: Variant, chip: int, width: int) -> bool:
    """Tell whether ``tile`` spills (nearly) no registers on compute capability ``chip``."""
    # Sums of tcgen05 have a memory of their own; decoding and masks of steps both take registers.
    limit = 128 if 100 <= chip < 120 else 64 if kind == "native" or width % 64 == 0 else 32
    return tile.bm * tile.bn // (32 * tile.warps) <= limit


def step(tile: Tile, width: int) -> int:
    """Return the columns of a step: ``tile.bk``, or less so that steps fill the width, but at least
    the 64 of a matrix instruction."""
    return min(tile.bk, max(64, width & -width))
