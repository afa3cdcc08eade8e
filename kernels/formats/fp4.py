"""Specification of the two FP4 formats (docs/method.md M4, layout L2).

MXFP4 is that of the OCP Microscaling Formats (MX) Specification v1.0; NVFP4 is NVIDIA's, as
described in *Pretraining Large Language Models with NVFP4* (arXiv 2509.25149). Both hold elements
in E2M1, +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}. A code counts halves of that, +-{0, 1, 2, 3, 4, 6, 8, 12}:
an integer, exact in INT8 and in FP8, so that "value = code * step" holds as for INT4.

Letters: N rows, K columns, G groups. A group's scale is one byte: E4M3 under a float32 global scale
(NVFP4), or E8M0 alone (MXFP4). Functions that take a global scale mean MXFP4 where it is None.
"""

import torch
from torch import Tensor

from .nibbles import pack_ranked, unpack_ranked

GROUPS = {"nvfp4": 16, "mxfp4": 32}
"""Elements that share a scale."""

LARGEST = 6.0
"""Largest element of E2M1."""

SCALE_LARGEST = 448.0
"""Largest number of E4M3."""

CODES = (0, 1, 2, 3, 4, 6, 8, 12)
"""Magnitude of a code by the lower three bits of its nibble; the fourth is the sign."""

ZERO = 2.0**-100
"""A group whose step is no larger has codes 0: its weights over its step might overflow."""

E8M0_BIAS = 127
E8M0_NAN = 255


def nearest_e2m1(v: Tensor, step: Tensor) -> Tensor:
    """Return the nearest codes of v, ties to the even mantissa, saturating: floating, in v's shape.

    v     floating
    step  value of a code of 1, broadcast against v; where it is (all but) zero, codes are 0
    """
    halves = torch.where(step > ZERO, v / step, 0.0)
    magnitude = halves.abs()
    # E2M1's numbers lie 1 (half) apart up to 4, 2 apart up to 8, 4 apart up to 12. What is halfway
    # between two of them has the even multiple of their distance as its even mantissa.
    distance = 1.0 + (magnitude >= 4) + 2 * (magnitude >= 8)
    return ((halves / distance).round() * distance).clamp(-12, 12)


def pack_e2m1(code_NK: Tensor) -> Tensor:
    """Pack codes as E2M1 bit patterns, two per byte (layout L2).

    code_NK  int8, one of +-CODES, [N, K], K even
    returns  uint8, [N, K // 2]; low nibble = even column; code 0 has no sign

    Raises ValueError if a number is no code, K is odd or the dtype is not int8.
    """
    return pack_ranked(code_NK, CODES)


def unpack_e2m1(packed_NK2: Tensor) -> Tensor:
    """Undo :func:`pack_e2m1`: uint8 [N, K // 2] -> int8 [N, K]."""
    return unpack_ranked(packed_NK2, CODES)


def global_scale(amax: Tensor) -> Tensor:
    """Return NVFP4's outer scale, which brings the largest group's E4M3 scale to its end.

    amax     floating >= 0: largest magnitude of what shares the scale
    returns  float32, amax / (6 * 448), and 1 where amax is 0; NaN stays NaN
    """
    scale = amax.float() / (LARGEST * SCALE_LARGEST)
    return torch.where(scale == 0, 1.0, scale)


def group_scales(amax_NG: Tensor, global_: Tensor | None) -> Tensor:
    """Return scale bytes of groups whose largest magnitude is ``amax_NG``.

    amax_NG  floating >= 0
    global_  float32, of :func:`global_scale`, broadcast against ``amax_NG``; or None
    returns  uint8, [N, G]: E4M3 of amax / (6 global), nearest even, saturating; without a global
             scale E8M0 of 2^(floor(log2 amax) - 2), which E2M1's largest power of two, 4, leaves
             (MX v1.0, 6.3: what lies above 6 of it saturates). NaN where amax is
    """
    if global_ is not None:
        unit = (amax_NG.float() / LARGEST / global_).clamp_max(SCALE_LARGEST)
        return unit.to(torch.float8_e4m3fn).view(torch.uint8)
    amax_NG = amax_NG.float()
    # frexp's mantissa is in [0.5, 1): its exponent is floor(log2) + 1.
    exponent = torch.where(amax_NG > 0, torch.frexp(amax_NG).exponent - 3, -E8M0_BIAS)
    byte = exponent.clamp(-E8M0_BIAS, E8M0_NAN - 1 - E8M0_BIAS) + E8M0_BIAS
    return torch.where(amax_NG.isfinite(), byte, E8M0_NAN).to(torch.uint8)


def steps(scale_NG: Tensor, global_: Tensor | None) -> Tensor:
    """Return the value of a code of 1, half the scale that bytes mean: float32, [N, G].

    scale_NG  uint8: E4M3 with a global scale, E8M0 without
    global_   float32, broadcast against ``scale_NG``; or None
    """
    if global_ is not None:
        return scale_NG.view(torch.float8_e4m3fn).float() * 0.5 * global_
    power = torch.ldexp(torch.ones_like(scale_NG, dtype=torch.float32), scale_NG.int() - 128)
    return torch.where(scale_NG == E8M0_NAN, torch.nan, power)
