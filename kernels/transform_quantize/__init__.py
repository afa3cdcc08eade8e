"""One pass over an activation: protected coefficients, spread remainder, 4- or 8-bit codes."""

from .reference import quantize_rows, transform, transform_quantize

__all__ = ["quantize_rows", "transform", "transform_quantize"]
