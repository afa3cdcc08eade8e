"""Specification of the block Hadamard transform (docs/method.md M2).

Letters: M rows, D channels, B block.
"""

import functools
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["sylvester", "regular"]
REGULAR_4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))
"""The regular Hadamard matrix of order 4: every row and column sums to 2."""


def hadamard_block(dim: int, limit: int, kind: Kind = "sylvester") -> int:
    """Return the largest order <= ``limit`` that divides ``dim`` (1 means no transform).

    Orders are powers of two; of regular matrices, of four.
    """
    step = 4 if kind == "regular" else 2
    block = 1
    while block * step <= limit and dim % (block * step) == 0:
        block *= step
    return block


@functools.lru_cache(maxsize=64)
def hadamard_matrix(
    block: int, dtype: torch.dtype, device: torch.device, kind: Kind = "sylvester"
) -> Tensor:
    """Return a Hadamard matrix over sqrt(B): [B, B], symmetric and orthogonal.

    ``sylvester``  has a column of equal signs, into which a constant offset of a row all goes
    ``regular``    Kronecker powers of an order-4 matrix whose rows and columns sum to 2: no column
                   sums to more than sqrt(B), so an offset is spread too (ConvRot, arXiv 2512.03673)

    Raises ValueError if ``block`` is not a power of two, or of four for ``regular``.
    """
    factors = {"sylvester": ((1, 1), (1, -1)), "regular": REGULAR_4}
    factor = torch.tensor(factors[kind], dtype=torch.float64)
    h_BB = torch.ones(1, 1, dtype=torch.float64)
    while h_BB.shape[0] < block:
        h_BB = torch.kron(factor, h_BB)
    if h_BB.shape[0] != block:
        power = {2: "two", 4: "four"}[len(factor)]
        raise ValueError(f"a {kind} Hadamard block must be a power of {power}, got {block}")
    return (h_BB / block**0.5).to(device=device, dtype=dtype)


def block_hadamard(x_MD: Tensor, block: int, kind: Kind = "sylvester") -> Tensor:
    """Compute x H with H = blockdiag of B x B Hadamard matrices / sqrt(B).

    x_MD     floating, [..., D], D a multiple of ``block``
    returns  same shape and dtype; block 1 returns x itself
    """
    if block == 1:
        return x_MD
    h_BB = hadamard_matrix(block, x_MD.dtype, x_MD.device, kind)
    return (x_MD.unflatten(-1, (-1, block)) @ h_BB).flatten(-2)
