"""Specification of the portable INT4 layout (docs/method.md, layout L1).

Letters: N outputs, K main-branch inputs.
"""

import torch
from torch import Tensor

from .nibbles import paired, refuse_unpairable


def pack_int4(q_NK: Tensor) -> Tensor:
    """Pack signed 4-bit codes, two per byte, row-major.

    q_NK     int8 in [-8, 7], [N, K], K even
    returns  uint8, [N, K // 2]; two's complement, low nibble = even column

    Raises ValueError if a code is out of range, K is odd or the dtype is not int8.
    """
    refuse_unpairable(q_NK)
    if q_NK.numel() and (int(q_NK.min()) < -8 or int(q_NK.max()) > 7):
        raise ValueError(f"codes must lie in [-8, 7], got [{int(q_NK.min())}, {int(q_NK.max())}]")
    return paired(q_NK.view(torch.uint8) & 0xF)


def unpack_int4(packed_NK2: Tensor) -> Tensor:
    """Undo :func:`pack_int4`: uint8 [N, K // 2] -> int8 [N, K]."""
    pairs = packed_NK2.view(torch.int8)
    # Arithmetic shifts on int8 extend the sign; << wraps within the byte.
    return torch.stack([(pairs << 4) >> 4, pairs >> 4], -1).flatten(-2)
