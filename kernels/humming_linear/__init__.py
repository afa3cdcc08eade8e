"""4-bit weights times 8-bit codes by Humming, which reads nibbles itself (docs/kernels.md)."""

from .reference import repack

__all__ = ["repack"]
