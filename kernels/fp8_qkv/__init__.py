"""q, k and v of an attention in FP8-E4M3, as FlashAttention-3 takes them."""

from .reference import Codes, attend, attention, quantize

__all__ = ["Codes", "attend", "attention", "quantize"]
