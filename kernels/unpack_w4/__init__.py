"""4-bit weights into an 8-bit scratch that matrix units read: FP8 or INT8, layout R1."""

from ..case import Case
from .reference import unpack_w4

__all__ = ["CASES", "unpack_w4"]

CASES = (
    Case(name="FLUX qkv", m=4608, k=3072, n=9216),
    Case(name="FLUX qkv + mlp", m=4608, k=3072, n=21504),
    Case(name="FLUX mlp down", m=4608, k=12288, n=3072),
    Case(name="FLUX out", m=4608, k=3072, n=3072),
)
"""Shapes that are measured, as times of their memory traffic; M doesn't matter."""
