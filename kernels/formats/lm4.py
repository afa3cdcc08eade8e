"""LM4: 4-bit weights that are one of 16 levels, placed where a Gaussian loses least (method.md M4).

A code is a nibble: the sign in bit 3, the rank of the magnitude in bits 0 to 2. Its value is
(-1)^sign LEVELS[rank]; there is no zero, and a flipped bit 3 is the negated value.

Derivation (tests/kernels/formats/test_lm4.py): the Lloyd-Max quantizer of a Gaussian with 16 levels
(Lloyd, IEEE Trans. Inf. Theory 1982; Max, IRE Trans. Inf. Theory 1960) has 20.22 dB. Of the levels
beside its own that are exact in 8-bit floats (E4M3) and, times :data:`UNITS`, in 8-bit integers,
these lose least: 20.19 dB. Integers in [-7, 7] have 18.90 dB at the same bits. So a chip's 8-bit
product computes the same number from either container.

In torch a code is int8, counted in units: "value = code * step" holds as for INT4, a step being the
scale's UNITS-th part. Letters: N outputs, K columns.
"""

import itertools

import torch
from torch import Tensor

from .nibbles import pack_ranked, unpack_ranked

LEVELS = (0.25, 0.8125, 1.375, 2.0, 2.75, 3.5, 4.5, 6.0)
"""Magnitudes by rank, a constant of the file format."""

UNITS = 16
"""Units of a scale: every level is a whole number of them."""

CODES = tuple(int(level * UNITS) for level in LEVELS)
"""Magnitudes in units: 4, 13, 22, 32, 44, 56, 72, 96."""

BETWEEN = tuple((low + high) / 2 for low, high in itertools.pairwise(CODES))
"""Magnitudes halfway between two codes: what is no larger takes the lower one."""


def nearest_lm4(v: Tensor, step: Tensor) -> Tensor:
    """Return the nearest codes of v, ties to the smaller magnitude: floating, in v's shape.

    v     floating; zero takes the smallest positive code
    step  value of a unit, broadcast against v; where it is zero, so is the value of every code
    """
    units = torch.where(step > 0, v / step, 0.0).add_(0.0)  # -0 + 0 is 0, which has no sign to copy
    rank = torch.bucketize(units.abs(), units.new_tensor(BETWEEN))
    return units.new_tensor(CODES)[rank].copysign_(units)


def pack_lm4(code_NK: Tensor) -> Tensor:
    """Pack codes as sign and rank, two per byte (layout L1).

    code_NK  int8, one of +-CODES, [N, K], K even
    returns  uint8, [N, K // 2]; low nibble = even column

    Raises ValueError if a number is no code, K is odd or the dtype is not int8.
    """
    return pack_ranked(code_NK, CODES)


def unpack_lm4(packed_NK2: Tensor) -> Tensor:
    """Undo :func:`pack_lm4`: uint8 [N, K // 2] -> int8 [N, K]."""
    return unpack_ranked(packed_NK2, CODES)
