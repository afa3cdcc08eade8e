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
    _refuse_unpairable(q_NK)
    if q_NK.numel() and (int(q_NK.min()) < -8 or int(q_NK.max()) > 7):
        raise ValueError(f"codes must lie in [-8, 7], got [{int(q_NK.min())}, {int(q_NK.max())}]")
    return _paired(q_NK.view(torch.uint8) & 0xF)


def unpack_int4(packed_NK2: Tensor) -> Tensor:
    """Undo :func:`pack_int4`: uint8 [N, K // 2] -> int8 [N, K]."""
    pairs = packed_NK2.view(torch.int8)
    # Arithmetic shifts on int8 extend the sign; << wraps within the byte.
    return torch.stack([(pairs << 4) >> 4, pairs >> 4], -1).flatten(-2)


def pack_ranked(code_NK: Tensor, magnitudes: Sequence[int]) -> Tensor:
    """Pack codes as sign and rank of the magnitude, two per byte.

    code_NK     int8, one of +-magnitudes, [N, K], K even
    magnitudes  eight, ascending
    returns     uint8, [N, K // 2]; low nibble = even column; bit 3 is the sign, which 0 has not

    Raises ValueError if a number is no code, K is odd or the dtype is not int8.
    """
    _refuse_unpairable(code_NK)
    codes = torch.tensor(magnitudes, dtype=torch.int16, device=code_NK.device)
    magnitude_NK = code_NK.short().abs()
    rank_NK = torch.bucketize(magnitude_NK, codes, out_int32=True).clamp_max(len(magnitudes) - 1)
    if bool((unknown := codes[rank_NK] != magnitude_NK).any()):
        raise ValueError(f"{int(code_NK[unknown][0])} is no code: those are +-{tuple(magnitudes)}")
    return _paired(rank_NK.to(torch.uint8) | (code_NK < 0).to(torch.uint8) << 3)


def unpack_ranked(packed_NK2: Tensor, magnitudes: Sequence[int]) -> Tensor:
    """Undo :func:`pack_ranked`: uint8 [N, K // 2] -> int8 [N, K]."""
    # Filled, not copied from the host, which CUDA graphs don't record.
    one = packed_NK2.new_ones(1, dtype=torch.int8)
    table = torch.cat([one * code for code in (*magnitudes, *(-m for m in magnitudes))])
    return table[torch.stack([packed_NK2 & 0xF, packed_NK2 >> 4], -1).flatten(-2).long()]


def _refuse_unpairable(code_NK: Tensor) -> None:
    if code_NK.dtype != torch.int8 or code_NK.shape[-1] % 2:
        raise ValueError(
            f"codes must be int8 with an even last dim, got {code_NK.dtype} {tuple(code_NK.shape)}"
        )


def _paired(nibbles_NK: Tensor) -> Tensor:
    return nibbles_NK[..., 0::2] | (nibbles_NK[..., 1::2] << 4)
