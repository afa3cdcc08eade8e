"""Attention of all queries to all keys: exact, or on 8-bit codes of q, k, P and v."""

from .engines import MODES, Mode, run, why_not

__all__ = ["MODES", "Mode", "run", "why_not"]
