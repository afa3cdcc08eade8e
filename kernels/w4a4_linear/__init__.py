"""4-bit weights times 4- or 8-bit activations, plus the low-rank branch and bias."""

from ..case import Case
from .reference import w4a4_linear

__all__ = ["CASES", "w4a4_linear"]

CASES = (
    Case(name="FLUX qkv", m=4608, k=3072, n=9216, reach=1.55, stretch=1.75),
    Case(name="FLUX mlp down", m=4608, k=12288, n=3072),
    Case(name="FLUX out", m=4608, k=3072, n=3072),
    Case(name="FLUX qkv", m=64, k=3072, n=9216),
)
"""Shapes that are measured: unpacking, product, low-rank branch and bias, on codes at hand."""
