"""Triton ``accumulate``: the lower triangle of XᵀX on the matrix units, 16-bit inputs.

Letters: T tokens, D channels; a program computes BM x BN of a tile (TILE x TILE), BK tokens a step.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..build import CHIPS, Config
from ..chip import capability, processors
from .reference import TILE

SIDE = tl.constexpr(TILE)
BAND = tl.constexpr(8)
"""Rows of tiles in turn: a wave's tiles form a square, and read few columns of X many times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Launch configuration; ``tma``: the tensor memory accelerator reads X, programs stay."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    tma: bool
    chips: tuple[int, ...]


TILES = (
    Tile(bm=128, bn=256, bk=64, warps=8, stages=3, tma=True, chips=(90,)),
    Tile(bm=128, bn=128, bk=32, warps=8, stages=4, tma=False, chips=CHIPS),
)
"""The first that a chip and an address allow is taken; the last takes all."""


@triton.jit
def _row_of(index):
    """Return row i of a triangle's element i (i + 1) / 2 + j."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row -= (row * (row + 1) // 2 > index).to(tl.int32)  # the root may be off by an ulp
    return row + ((row + 1) * (row + 2) // 2 <= index).to(tl.int32)


@triton.jit
def _tile_at(index, n):
    """Return row and column of the ``index``-th tile: bands of rows, in a band by columns."""
    first = _row_of(index) // BAND * BAND
    height = tl.minimum(n - first, BAND)
    place = index - first * (first + 1) // 2
    corner = place - height * first  # in the triangle that ends the band, if not negative
    row = _row_of(tl.maximum(corner, 0))
    inside = corner >= 0
    i = tl.where(inside, row, place % height)
    j = tl.where(inside, first + corner - row * (row + 1) // 2, place // height)
    return first + i, j


@triton.jit
def add_gram(
    p_total, p_x, T, D, n, row_stride, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Add one BM x BN part of one tile."""
    PARTS: tl.constexpr = (SIDE // BM) * (SIDE // BN)
    i, j = _tile_at(tl.program_id(0) // PARTS, n)
    part = tl.program_id(0) % PARTS
    o_m = part // (SIDE // BN) * BM + tl.arange(0, BM)
    o_n = part % (SIDE // BN) * BN + tl.arange(0, BN)
    left, right, o_t = i * SIDE + o_m, j * SIDE + o_n, tl.arange(0, BK)
    # Tokens past the end and channels past D read zeros, and add nothing.
    rows = (o_t.to(tl.int64) * row_stride)[:, None]
    step = tl.cast(row_stride, tl.int64) * BK
    p_left, p_right = p_x + rows + left[None, :], p_x + rows + right[None, :]
    m_left, m_right = (left < D)[None, :], (right < D)[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for t in range(0, T, BK):
        m_t = (t + o_t < T)[:, None]
        a = tl.load(p_left, mask=m_t & m_left, other=0.0)  # [BK, BM]
        b = tl.load(p_right, mask=m_t & m_right, other=0.0)  # [BK, BN]
        acc = tl.dot(tl.trans(a), b, acc)
        p_left += step
        p_right += step
    tile = (i * (i + 1) // 2 + j).to(tl.int64)
    p_out = p_total + tile * (SIDE * SIDE) + o_m[:, None] * SIDE + o_n[None, :]
    # Matrix units cut off what they add to a sum; added at the end, the calls before lose nothing.
    tl.store(p_out, tl.load(p_out) + acc)


@triton.jit
def _add(total, row, column, part):
    total.store([row, column], total.load([row, column]) + part)


@triton.jit
def add_gram_tma(
    total, x_left, x_right, T, n, programs,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Add all parts by one program per multiprocessor; descriptors read zeros past the end.

    total    float32 [L * SIDE, SIDE], blocks [BM, BN / 4]
    x_left   [T, D], blocks [BK, BM]; x_right: the same X, blocks [BK, BN]
    """
    PARTS: tl.constexpr = (SIDE // BM) * (SIDE // BN)
    Q: tl.constexpr = BN // 4
    for work in tl.range(tl.program_id(0), programs, tl.num_programs(0), flatten=True):
        index = tl.cast(work, tl.int32)  # the interpreter counts in Python's numbers
        i, j = _tile_at(index // PARTS, n)
        part = index % PARTS
        m = part // (SIDE // BN) * BM
        column = part % (SIDE // BN) * BN
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for t in range(0, T, BK):
            a = x_left.load([t, i * SIDE + m])
            b = x_right.load([t, j * SIDE + column])
            acc = tl.dot(tl.trans(a), b, acc)
        # As above, and in quarters: shared memory is full of the next part's X.
        row = (i * (i + 1) // 2 + j) * SIDE + m
        low, high = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        first, second = tl.split(tl.permute(tl.reshape(low, (BM, 2, Q)), (0, 2, 1)))
        third, fourth = tl.split(tl.permute(tl.reshape(high, (BM, 2, Q)), (0, 2, 1)))
        _add(total, row, column, first)
        _add(total, row, column + Q, second)
        _add(total, row, column + 2 * Q, third)
        _add(total, row, column + 3 * Q, fourth)


def launch(total_LBB: Tensor, x_TD: Tensor, *, tile: Tile | None = None) -> None:
    """Run :func:`.reference.accumulate` on bf16 or fp16 activations.

    ``tile``  which one to run; None: what suits the chip and the address
    """
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    tile = tile or _chosen(x_TD)
    (tokens, dim), n = x_TD.shape, triton.cdiv(x_TD.shape[1], TILE)
    made = config(tile)
    programs = len(total_LBB) * (TILE // tile.bm) * (TILE // tile.bn)
    if tokens == 0:
        return
    with torch.cuda.device_of(x_TD):
        if tile.tma:
            made.launch(
                (min(programs, processors(x_TD.device)),),
                TensorDescriptor.from_tensor(total_LBB.view(-1, TILE), [tile.bm, tile.bn // 4]),
                TensorDescriptor.from_tensor(x_TD, [tile.bk, tile.bm]),
                TensorDescriptor.from_tensor(x_TD, [tile.bk, tile.bn]),
                tokens, n, programs,
            )  # fmt: skip
        else:
            made.launch((programs,), total_LBB, x_TD, tokens, dim, n, x_TD.stride(0))


def config(tile: Tile) -> Config:
    return Config(
        kernel=add_gram_tma if tile.tma else add_gram,
        constants={"BM": tile.bm, "BN": tile.bn, "BK": tile.bk},
        warps=tile.warps,
        stages=tile.stages,
    )


def _chosen(x_TD: Tensor) -> Tile:
    chip = capability(x_TD.device)
    return next(t for t in TILES if not t.tma or (chip in t.chips and tma_reads(x_TD)))


def tma_reads(x_TD: Tensor) -> bool:
    """Whether a descriptor can address ``x_TD``: row starts at multiples of 16 bytes."""
    return x_TD.data_ptr() % 16 == 0 and x_TD.stride(0) * x_TD.element_size() % 16 == 0
