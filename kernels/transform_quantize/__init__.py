"""One pass over an activation: protected coefficients, spread remainder, 4- or 8-bit codes."""

from ..case import Case
from .reference import dequantize_rows, quantize_rows, transform, transform_quantize

__all__ = ["CASES", "dequantize_rows", "quantize_rows", "transform", "transform_quantize"]

GROUPS = (16, 32, 64, 128, 256)
"""Channels that may share an activation scale in the kernels, if not the whole row does."""

MAX_BLOCK = 512
"""Their largest Hadamard block."""

MAX_RANK = 128
"""Most directions that ``rotate`` projects out; above it, plain matrix products do."""

MAX_DIRECTIONS = 256
"""Most that ``project`` finds coefficients of: those, and others that stay in z."""

CASES = (
    Case(name="FLUX qkv", m=4608, k=3072, n=9216, reach=3.0, stretch=2.0),
    Case(name="FLUX mlp down", m=4608, k=12288, n=3072, reach=2.2, stretch=1.6),
    Case(name="PixArt qkv", m=4096, k=1152, n=3456),
    Case(name="SANA mlp up", m=1024, k=2240, n=11200),
)
"""Shapes that are measured, as times of their memory traffic; all with c = x P."""
