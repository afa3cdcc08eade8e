"""How the Triton engine of ``w4a4_linear`` cuts a product into tiles: what tuning may choose from.

Needs neither triton nor a GPU. Letters: M rows, N outputs, K main-branch width, G groups.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..build import shared_bytes
from ..permuted import BLOCK

Variant = Literal["packed", "unpacked", "tma", "grouped"]
"""Weights decoded from nibbles in registers; weights unpacked before; the same read through the
tensor memory accelerator by programs that stay (sm_90); group scales, on packed or unpacked
weights."""


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
    tma: bool = False

    def shared_kib(self, variant: Variant) -> float:
        """Return the shared memory a program needs at most, in KiB."""
        weight_bytes = self.bk * self.bn // (2 if variant == "packed" else 1)
        steps = self.stages * (self.bk * self.bm + weight_bytes)
        if variant != "tma":
            return steps / 1024
        # The next tile's steps are under way while c and WP are multiplied and half of y leaves.
        return (steps + 2 * 64 * (self.bm + self.bn) + self.bm * self.bn) / 1024


TILES: Mapping[Variant, tuple[Tile, ...]] = {
    "packed": (
        # Many rows.
        Tile(bm=128, bn=128, bk=128, warps=8, stages=4),
        Tile(bm=64, bn=128, bk=128, warps=4, stages=3),
        # Few rows: the weights' bytes are the time, so many of them have to be under way.
        Tile(bm=16, bn=64, bk=256, warps=4, stages=5),
    ),
    "unpacked": (
        Tile(bm=64, bn=128, bk=128, warps=4, stages=3),
        Tile(bm=64, bn=64, bk=128, warps=4, stages=4),
    ),
    "tma": (
        Tile(bm=128, bn=256, bk=128, warps=8, stages=3, tma=True),
        Tile(bm=128, bn=128, bk=128, warps=8, stages=4, tma=True),
    ),
    "grouped": (
        Tile(bm=64, bn=128, bk=128, warps=8, stages=3),
        Tile(bm=16, bn=64, bk=128, warps=4, stages=4),
    ),
}
"""The configurations worth trying, by variant; :func:`fits` says on which chips."""


def fits(tile: Tile, variant: Variant, chip: int, *, fp8: bool) -> bool:
    """Tell whether ``tile`` runs without spilling registers on compute capability ``chip``.

    ``chip``: 90 is 9.0; ``fp8`` says which container the codes are in.
    """
    if variant == "tma" and chip != 90:
        return False
    shared = shared_bytes(chip) / 1024
    accumulators = tile.bm * tile.bn // (32 * tile.warps)
    # Only Hopper's FP8 instructions leave registers for 128 accumulators a thread: they read both
    # operands from shared memory. Decoding packed weights takes registers again.
    roomy = chip == 90 and fp8 and variant in ("unpacked", "tma")
    limit = 128 if roomy else 64
    return accumulators <= limit and tile.shared_kib(variant) <= shared


def packed_fits(width: int) -> bool:
    """Tell whether the packed kernel can read the weights: it reads 8 columns at a time."""
    return width % 8 == 0


def scales_fit(width: int, act_groups: int, weight_groups: int) -> bool:
    """Tell whether the kernels can read these scales.

    ``act_groups`` and ``weight_groups`` scales per row of ``width`` columns: 1 on both sides, or
    groups of a multiple of 64 columns. Smaller groups would be torn apart by the order of the
    codes (layout R1), and stay on the reference path.
    """
    return all(
        groups == 1 or (width % groups == 0 and width // groups % BLOCK == 0)
        for groups in (act_groups, weight_groups)
    )


def step(tile: Tile, act_group: int, weight_group: int) -> int:
    """Return the columns of a step: ``tile.bk``, or less so that no step crosses a scale's border.

    Group sizes in columns; 0 for one scale per row.
    """
    border = math.gcd(act_group, weight_group)
    return tile.bk if border == 0 else min(tile.bk, border & -border)
