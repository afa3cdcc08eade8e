"""Static 4-bit weight grids: scales with a clip search, rounding to the grid, and back."""

from .reference import QMAX, codes_on_grid, dequantize_weight, scale_floor, weight_scales

__all__ = ["QMAX", "codes_on_grid", "dequantize_weight", "scale_floor", "weight_scales"]
