"""How the Triton engine of ``w4a16_linear`` cuts a product into tiles: what tuning may choose from.

Needs neither triton nor a GPU. A word is 32 bits, eight weight codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One launch configuration.

    A program multiplies ``bm`` rows with ``bn`` outputs, 8 ``words`` columns a step: one ``row`` by
    multiply-adds in float32, or several by ``dots`` on the tensor cores. Group scales multiply the
    ``weights``, in the activations' dtype, or the float32 ``sums`` of a group, which ends a step:
    exact, but slow for many rows. Where steps don't fit the groups, ``sums`` falls back to
    ``weights``. A ``row`` always scales sums.
    """

    kind: Literal["row", "dots"]
    bm: int = 1
    bn: int
    words: int
    warps: int
    stages: int = 1
    scale: Literal["weights", "sums"] = "sums"


TILES: Mapping[str, tuple[Tile, ...]] = {
    "row": (
        Tile(kind="row", bn=16, words=128, warps=2),
        Tile(kind="row", bn=16, words=128, warps=4),
    ),
    "few": (
        Tile(kind="dots", bm=16, bn=64, words=32, warps=4, stages=4, scale="weights"),
        Tile(kind="dots", bm=16, bn=64, words=8, warps=4, stages=6, scale="sums"),
    ),
    "many": (
        Tile(kind="dots", bm=64, bn=64, words=16, warps=4, stages=3, scale="weights"),
        Tile(kind="dots", bm=64, bn=128, words=16, warps=8, stages=3, scale="weights"),
    ),
    "wide": (
        Tile(kind="dots", bm=128, bn=128, words=8, warps=8, stages=4, scale="weights"),
        Tile(kind="dots", bm=128, bn=128, words=16, warps=8, stages=3, scale="weights"),
        Tile(kind="dots", bm=16, bn=64, words=64, warps=4, stages=3, scale="weights"),
    ),
}
"""The configurations worth measuring: one row, a handful, many; ``wide`` ones run on
WIDE_CHIPS only."""

WIDE_CHIPS = (90,)
"""Chips whose matrix instructions read both operands from shared memory: registers are left."""


def fits(width: int, groups: int) -> bool:
    """Tell whether the kernels can read ``width`` columns with ``groups`` scales per row."""
    whole_words = width % 8 == 0
    return whole_words and (groups == 1 or (width % groups == 0 and width // groups % 32 == 0))


def takes_tables(tile: Tile) -> bool:
    """Tell whether registers are left for LM4's tables: for 16 words a thread on tensor cores."""
    return tile.kind == "row" or tile.bn * tile.words <= 16 * 32 * tile.warps


def usual(rows: int, chip: int) -> Tile:
    """Return the tile for ``rows`` rows on a chip (90: 9.0), where nobody measured."""
    if rows <= 2:
        return TILES["row"][0]
    if rows <= 16:
        return TILES["few"][0]
    return TILES["wide"][0] if chip in WIDE_CHIPS and rows > 256 else TILES["many"][0]
