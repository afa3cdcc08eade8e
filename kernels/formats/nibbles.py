"""Two 4-bit codes in a byte: low nibble = even column (docs/method.md, layouts L1 and L2).

Letters: N outputs, K main-branch inputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def paired(nibbles_NK: Tensor) -> Tensor:
    """Put two neighbouring nibbles, uint8 below 16, into a byte: [N, K] -> [N, K // 2]."""
    return nibbles_NK[..., 0::2] | (nibbles_NK[..., 1::2] << 4)


def refuse_unpairable(code_NK: Tensor) -> None:
    """Raise ValueError for codes that are no int8, or in an odd number of columns."""
    if code_NK.dtype != torch.int8 or code_NK.shape[-1] % 2:
        raise ValueError(
            f"codes must be int8 with an even last dim, got {code_NK.dtype} {tuple(code_NK.shape)}"
        )


def pack_ranked(code_NK: Tensor, magnitudes: Sequence[int]) -> Tensor:
    """Pack codes as sign and rank of the magnitude, two per byte.

    code_NK     int8, one of +-magnitudes, [N, K], K even
    magnitudes  eight, ascending
    returns     uint8, [N, K // 2]; low nibble = even column; bit 3 is the sign, which 0 has not

    Raises ValueError if a number is no code, K is odd or the dtype is not int8.
    """
    refuse_unpairable(code_NK)
    codes = torch.tensor(magnitudes, dtype=torch.int16, device=code_NK.device)
    magnitude_NK = code_NK.short().abs()
    rank_NK = torch.bucketize(magnitude_NK, codes, out_int32=True).clamp_max(len(magnitudes) - 1)
    if bool((unknown := codes[rank_NK] != magnitude_NK).any()):
        raise ValueError(f"{int(code_NK[unknown][0])} is no code: those are +-{tuple(magnitudes)}")
    return paired(rank_NK.to(torch.uint8) | (code_NK < 0).to(torch.uint8) << 3)


def unpack_ranked(packed_NK2: Tensor, magnitudes: Sequence[int]) -> Tensor:
    """Undo :func:`pack_ranked`: uint8 [N, K // 2] -> int8 [N, K]."""
    # Filled, not copied from the host, which CUDA graphs don't record.
    one = packed_NK2.new_ones(1, dtype=torch.int8)
    table = torch.cat([one * code for code in (*magnitudes, *(-m for m in magnitudes))])
    return table[torch.stack([packed_NK2 & 0xF, packed_NK2 >> 4], -1).flatten(-2).long()]
