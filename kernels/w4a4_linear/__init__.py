"""4-bit weights times 4- or 8-bit activations, plus the protected branch and bias."""

from .reference import w4a4_linear

__all__ = ["w4a4_linear"]
