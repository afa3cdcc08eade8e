"""4-bit weights times 16-bit activations: for linears that see a handful of rows."""

from .reference import w4a16_linear

__all__ = ["w4a16_linear"]
