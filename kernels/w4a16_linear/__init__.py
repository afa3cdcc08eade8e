"""4-bit weights times 16-bit activations: for linears that see a handful of rows."""

from ..case import Case
from .reference import w4a16_linear

__all__ = ["CASES", "w4a16_linear"]

CASES = (
    Case(name="FLUX modulator", m=1, k=3072, n=18432, rank=0, reach=2.5, stretch=3.3),
    Case(name="FLUX modulator", m=4, k=3072, n=18432, rank=0),
    Case(name="FLUX modulator", m=16, k=3072, n=18432, rank=0),
    Case(name="FLUX single modulator", m=1, k=3072, n=9216, rank=0),
)
"""Shapes that are measured: few rows, groups of 64."""
