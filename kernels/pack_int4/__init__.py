"""Two signed 4-bit codes in a byte: the portable layout on disk."""

from .reference import pack_int4, unpack_int4

__all__ = ["pack_int4", "unpack_int4"]
