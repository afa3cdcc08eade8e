"""q, k and v of an attention in FP8-E4M3, as FlashAttention-3 takes them."""

from .reference import Codes, attention, quantize

__all__ = ["Codes", "attention", "quantize"]
