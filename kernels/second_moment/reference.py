"""Specification of the block triangle, its CPU path and its way back to a matrix.

Letters: T tokens, D channels, B side of a tile (TILE), n = ceil(D / TILE) tiles per side, L tiles
of the lower triangle. Tile (i, j), j <= i, stands at i (i + 1) / 2 + j and holds
XᵀX[i B : (i + 1) B, j B : (j + 1) B]; tiles on the diagonal are whole. Past channel D all is zero.
"""

import torch
from torch import Tensor

from ..full_float32 import full_float32

TILE = 256
"""Side of a tile."""


def tiles(dim: int) -> int:
    """Count the tiles in the lower triangle of ``dim`` channels."""
    n = -(-dim // TILE)
    return n * (n + 1) // 2


def new(dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Return an empty sum: float32 zeros, [tiles(dim), TILE, TILE]."""
    return torch.zeros(tiles(dim), TILE, TILE, device=device)


def accumulate(total_LBB: Tensor, x_TD: Tensor) -> None:
    """Add XᵀX to total in place: products of float32 numbers, added up in float32.

    total_LBB  float32, [tiles(D), TILE, TILE]
    x_TD       float, [T, D]

    Raises ValueError if ``total_LBB`` was not made for D channels.
    """
    check(total_LBB, x_TD)
    x_TD = x_TD.to(total_LBB.dtype)
    with full_float32():
        for i, start in enumerate(range(0, x_TD.shape[1], TILE)):
            x_TB = x_TD[:, start : start + TILE]
            row_BC = x_TB.mT @ x_TD[:, : start + TILE]
            for j, part_BB in enumerate(row_BC.split(TILE, 1)):
                height, width = part_BB.shape
                total_LBB[i * (i + 1) // 2 + j, :height, :width] += part_BB


def unpack(total_LBB: Tensor, dim: int) -> Tensor:
    """Return the whole matrix, [dim, dim], exactly symmetric, in the sum's dtype."""
    _check_dim(total_LBB, dim)
    n = -(-dim // TILE)
    whole = total_LBB.new_empty(n, TILE, n, TILE)
    for i in range(n):
        first, diagonal = i * (i + 1) // 2, i * (i + 3) // 2
        left_iBB = total_LBB[first:diagonal]
        whole[i, :, :i] = left_iBB.transpose(0, 1)
        whole[:i, :, i] = left_iBB.mT
        lower_BB = total_LBB[diagonal].tril()
        whole[i, :, i] = lower_BB + lower_BB.tril(-1).mT
    return whole.view(n * TILE, n * TILE)[:dim, :dim].contiguous()


def trace(total_LBB: Tensor, dim: int) -> Tensor:
    """Return the sum of squares of all that was added up, []; NaN or inf if any was."""
    _check_dim(total_LBB, dim)
    i = torch.arange(-(-dim // TILE), device=total_LBB.device)
    return total_LBB[i * (i + 3) // 2].diagonal(dim1=1, dim2=2).sum()


def check(total_LBB: Tensor, x_TD: Tensor) -> None:
    """Raise ValueError unless ``total_LBB`` can take ``x_TD``."""
    if x_TD.ndim != 2:
        raise ValueError(
            f"activations have shape {tuple(x_TD.shape)}; flatten them to [tokens, channels]"
        )
    _check_dim(total_LBB, x_TD.shape[1])


def _check_dim(total_LBB: Tensor, dim: int) -> None:
    shape = (tiles(dim), TILE, TILE)
    if total_LBB.shape != shape:
        raise ValueError(
            f"a second moment of {dim} channels is a block triangle of shape {shape}, not "
            f"{tuple(total_LBB.shape)}; make it with new({dim})"
        )
