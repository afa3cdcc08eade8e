"""Order of columns and rows: the rotation's, and a product's. Letters as in passes.py."""

import triton
import triton.language as tl


@triton.jit
def _parity_sign(v):
    """Return -1 where the number of set bits of v (< 512) is odd, else 1."""
    v = v ^ (v >> 8)
    v = v ^ (v >> 4)
    v = v ^ (v >> 2)
    v = (v ^ (v >> 1)) & 1
    return 1.0 - 2.0 * v.to(tl.float32)


@triton.jit
def rotation(B: tl.constexpr, W: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Return sqrt(b) blockdiag(H_b) [W, W], b <= W: entries 0 and +-1. Its columns are in R1 order
    once :func:`renamed`."""
    i = tl.arange(0, W)
    place = i // 64 * 64 + i // 2 % 4 * 16 + i // 8 % 8 * 2 + i % 2
    column = place // 64 * 64 + place % 32 * 2 + place % 64 // 32
    if TRANSPOSED:
        row = i[None, :]
        col = column[:, None]
    else:
        row = i[:, None]
        col = column[None, :]
    sign = _parity_sign((row % B) & (col % B))
    return tl.where(row // B == col // B, sign, 0.0)


@triton.jit
def renamed(y):
    """Rename y [BM, W], a product with :func:`rotation`: columns to R1 order, rows as
    :func:`row_at` says.

    Nothing moves. Of 64 columns of a row, thread t of four holds 8 j + 2 t + (0, 1), j = 0 ... 7.
    Called 16 t + 2 j + (0, 1), they are neighbours: a group's largest is found and 16 codes are
    stored with hardly a word between threads. A warp's rows are called what a store gives it.
    """
    BM: tl.constexpr = y.shape[0]
    W: tl.constexpr = y.shape[1]
    y = tl.reshape(y, (BM // 16, 2, 8, W // 64, 8, 4, 2))
    return tl.reshape(tl.permute(y, (1, 0, 2, 3, 5, 4, 6)), (BM, W))


@triton.jit
def row_at(BM: tl.constexpr):
    """Return the row of the product that stands in each row of :func:`renamed`, [BM]."""
    i = tl.arange(0, BM)
    HALF: tl.constexpr = BM // 2
    return i % HALF // 8 * 16 + i // HALF * 8 + i % 8
