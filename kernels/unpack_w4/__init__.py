"""4-bit weights into an 8-bit scratch that matrix units read: FP8 or INT8, layout R1."""

from .reference import unpack_w4

__all__ = ["unpack_w4"]
