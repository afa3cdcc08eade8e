"""Second moments: every tile, and channels that are no multiple of 16."""

from dirotq.kernels.build import Build
from dirotq.kernels.second_moment.kernel import TILES, Tile, config


def builds() -> list[Build]:
    """Return every tile, bf16 and fp16, and channels that are no multiple of 16."""
    found = [_build(tile, kind) for tile in TILES for kind in ("bf16", "fp16")]
    return [*found, _build(TILES[-1], "bf16", ragged=True)]


def _build(tile: Tile, kind: str, *, ragged: bool = False) -> Build:
    made = config(tile)
    types = {
        "p_total": "*fp32",
        "p_x": f"*{kind}",
        "total": f"tensordesc<fp32[{tile.bm}, {tile.bn // 4}]>",
        "x_left": f"tensordesc<{kind}[{tile.bk}, {tile.bm}]>",
        "x_right": f"tensordesc<{kind}[{tile.bk}, {tile.bn}]>",
    }
    return Build.of(
        made, types, aligned=() if ragged else ("D", "row_stride"),
        name=f"second_moment-{made.kernel.__name__}-{kind}{'-ragged' if ragged else ''}",
        chips=tile.chips,
    )  # fmt: skip
