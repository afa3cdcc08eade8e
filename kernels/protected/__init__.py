"""8-bit protected branches: coefficients per row, weights per output."""

from .reference import dequantize_protected, quantize_protected, rounded_coefficients

__all__ = ["dequantize_protected", "quantize_protected", "rounded_coefficients"]
