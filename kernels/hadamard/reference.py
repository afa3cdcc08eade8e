"""Specification of the block Hadamard transform (docs/method.md M2).

Letters: M rows, D channels, B block.
"""

import functools

import torch
from torch import Tensor


def hadamard_block(dim: int, limit: int) -> int:
    """Largest power of two <= ``limit`` that divides ``dim`` (1 means no transform)."""
    block = 1
    while block * 2 <= limit and dim % (block * 2) == 0:
        block *= 2
    return block


@functools.lru_cache(maxsize=64)
def hadamard_matrix(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's Hadamard matrix over sqrt(B): [B, B], symmetric and orthogonal.

    Raises ValueError if ``block`` is not a power of two.
    """
    if block < 1 or block & (block - 1):
        raise ValueError(f"a Hadamard block must be a power of two, got {block}")
    h_BB = torch.ones(1, 1, dtype=torch.float64)
    while h_BB.shape[0] < block:
        h_BB = torch.cat([torch.cat([h_BB, h_BB], 1), torch.cat([h_BB, -h_BB], 1)], 0)
    return (h_BB / block**0.5).to(device=device, dtype=dtype)


def block_hadamard(x_MD: Tensor, block: int) -> Tensor:
    """x H with H = blockdiag of B x B Hadamard matrices / sqrt(B).

    x_MD     floating, [..., D], D a multiple of ``block``
    returns  same shape and dtype; block 1 returns x itself
    """
    if block == 1:
        return x_MD
    h_BB = hadamard_matrix(block, x_MD.dtype, x_MD.device)
    return (x_MD.unflatten(-1, (-1, block)) @ h_BB).flatten(-2)
