"""LM4: 4-bit weights that are one of 16 levels, placed where a Gaussian loses least (method.md M4).

A code is a nibble: the sign in bit 3, the rank of the magnitude in bits 0 to 2. Its value is
(-1)^sign LEVELS[rank]; there is no zero, and a flipped bit 3 is the negated value.

Derivation (tests/kernels/formats/test_lm4.py): the Lloyd-Max quantizer of a Gaussian with 16 levels
(Lloyd, IEEE Trans. Inf. Theory 1982; Max, IRE Trans. Inf. Theory 1960) has 20.22 dB. Of the levels
beside its own that are exact in 8-bit floats (E4M3) and, times :data:`UNITS`, in 8-bit integers,
these lose least: 20.19 dB. Integers in [-7, 7] have 18.90 dB at the same bits. So a chip's 8-bit
product computes the same number from either container.
"""

LEVELS = (0.25, 0.8125, 1.375, 2.0, 2.75, 3.5, 4.5, 6.0)
"""Magnitudes by rank, a constant of the file format."""

UNITS = 16
"""Every level is a whole number of 1 / UNITS: 4, 13, 22, 32, 44, 56, 72, 96."""
