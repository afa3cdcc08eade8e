"""The order of activation codes at run time, layout R1 (docs/kernels.md).

Within every 64 columns the 32 even ones come first, then the 32 odd ones: the low nibbles of 32
packed bytes are then 32 neighbouring columns, the high nibbles the next 32, and unpacking needs no
interleave. Letters: M rows, K columns.
"""

import torch
from torch import Tensor

BLOCK = 64
"""Columns that are permuted among themselves."""


def padded(width: int) -> int:
    """Return the columns of a code matrix in R1 order: ``width`` filled up to whole blocks."""
    return -(-width // BLOCK) * BLOCK


def to_permuted(codes_MK: Tensor) -> Tensor:
    """Bring [M, K] from the network's order to R1 order, [M, padded(K)], same dtype."""
    columns = codes_MK.shape[-1]
    out = codes_MK.new_zeros(*codes_MK.shape[:-1], padded(columns))
    out[..., :columns] = codes_MK
    return out.unflatten(-1, (-1, BLOCK // 2, 2)).mT.flatten(-3)


def from_permuted(codes_MK: Tensor, width: int) -> Tensor:
    """Undo :func:`to_permuted`: the first ``width`` columns in the network's order."""
    blocks = codes_MK[..., : padded(width)].unflatten(-1, (-1, 2, BLOCK // 2))
    return torch.flatten(blocks.mT, -3)[..., :width]


def permuted_columns(width: int, device: torch.device) -> Tensor:
    """Return the network's column at each place of R1 order: int64 [padded(width)].

    Places behind the last column of a ragged block name columns >= ``width``.
    """
    return to_permuted(torch.arange(padded(width), device=device)[None])[0]
