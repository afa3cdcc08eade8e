"""Specification of the portable INT4 layout (docs/method.md, layout L1).

Letters: N outputs, K main-branch inputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def pack_int4(q_NK: Tensor) -> Tensor:
    """Pack signed 4-bit codes, two per byte, row-major.

    q_NK     int8 in [-8, 7], [N, K], K even
    returns  uint8, [N, K // 2]; two's complement, low nibble = even column

    Raises ValueError if a code is out of range, K is odd or the dtype is not int8.
    """
    if q_NK.dtype != torch.int8 or q_NK.shape[-1] % 2:
        raise ValueError(
            f"codes must be int8 with an even last dim, got {q_NK.dtype} {tuple(q_NK.shape)}"
        )
    if q_NK.numel() and (int(q_NK.min()) < -8 or int(q_NK.max()) > 7):
        raise ValueError(f"codes must lie in [-8, 7], got [{int(q_NK.min())}, {int(q_NK.max())}]")
    nibbles = q_NK.view(torch.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed_NK2: Tensor) -> Tensor:
    """Undo :func:`pack_int4`: uint8 [N, K // 2] -> int8 [N, K]."""
    pairs = packed_NK2.view(torch.int8)
    # Arithmetic shifts on int8 extend the sign; << wraps within the byte.
    return torch.stack([(pairs << 4) >> 4, pairs >> 4], -1).flatten(-2)


def looked_up(packed_NK2: Tensor, codes: Sequence[int]) -> Tensor:
    """Return the code of each nibble, low ones first: uint8 [N, K // 2] -> int8 [N, K].

    codes  of the nibbles 0 to 15
    """
    # Filled, not copied from the host, which CUDA graphs don't record.
    one = packed_NK2.new_ones(1, dtype=torch.int8)
    table = torch.cat([one * code for code in codes])
    return table[torch.stack([packed_NK2 & 0xF, packed_NK2 >> 4], -1).flatten(-2).long()]
