"""Static 4-bit weight grids: scales with a clip search, rounding to the grid, and back."""

from .reference import (
    QMAX,
    codes_on_grid,
    dequantize_weight,
    fp4_weight_scales,
    nearest_codes,
    pack_codes,
    scale_floor,
    stored_scales,
    tail_floor,
    unpack_weight,
    weight_scales,
    weight_steps,
)

__all__ = [
    "QMAX",
    "codes_on_grid",
    "dequantize_weight",
    "fp4_weight_scales",
    "nearest_codes",
    "pack_codes",
    "scale_floor",
    "stored_scales",
    "tail_floor",
    "unpack_weight",
    "weight_scales",
    "weight_steps",
]
