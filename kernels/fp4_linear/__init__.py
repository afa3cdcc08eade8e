"""FP4 weights times FP4 or 16-bit activations, with one scale per group of columns."""

__all__ = ["NATIVE"]

NATIVE = (100, 120)
"""Chips whose matrix units multiply FP4 with group scales. Elsewhere numbers become bf16 on the
way, exactly, and the units for those are used."""
