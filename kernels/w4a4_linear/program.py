"""What every program of the ``w4a4_linear`` kernels does: find its tile, and finish it.

Letters: M rows, N outputs, R low-rank directions; BM, BN, BR are their tiles.
"""

import triton
import triton.language as tl

from ..lm4_lookup import UNITS_PER_SCALE


@triton.jit
def tile_at(index, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP_M: tl.constexpr):
    """Return a program's row tile and output tile: GROUP_M row tiles in turn reuse weights."""
    band = GROUP_M * tl.cdiv(N, BN)
    first = index // band * GROUP_M
    height = min(tl.cdiv(M, BM) - first, GROUP_M)
    return first + index % band % height, index % band // height


@triton.jit
def multiply(left, right, acc):
    """Return acc + left rightᵀ of 8-bit codes."""
    return tl.dot(left, tl.trans(right), acc, out_dtype=acc.dtype)


@triton.jit
def weight_scale(wscale_at, FP8: tl.constexpr, LM4: tl.constexpr):
    """Load the value of a weight code of 1 in float32: LM4 counts units of the scale, and FP8
    weights are codes * 2^-9, which is made up for here."""
    UNIT: tl.constexpr = (512.0 if FP8 else 1.0) / (UNITS_PER_SCALE if LM4 else 1)
    return tl.load(wscale_at).to(tl.float32) * UNIT


@triton.jit
def finish(
    acc, c_ptr, c_stride, wp_ptr, wp_stride, bias_ptr, row, col,
    R: tl.constexpr, BIAS: tl.constexpr, DOT: tl.constexpr, WEIGHTS_LEFT: tl.constexpr,
):  # fmt: skip
    """Return acc + c (WP)ᵀ + bias in float32, [BM, BN].

    acc       float32, scaled: [BM, BN], or [BN, BM] where the weights are the left operand
    row, col  int64, [BM] and [BN], all of them valid
    """
    if R > 0:  # without a rank there is nothing to point at either
        BR: tl.constexpr = 64 if R > 32 else (32 if R > 16 else 16)
        for start in tl.range(0, R, BR, num_stages=1):
            r = start + tl.arange(0, BR)
            inside = (r < R)[None, :]
            c = tl.load(c_ptr + (row * c_stride)[:, None] + r[None, :], mask=inside, other=0.0)
            wp = tl.load(wp_ptr + (col * wp_stride)[:, None] + r[None, :], mask=inside, other=0.0)
            c, wp = c.to(DOT), wp.to(DOT)  # [BM, BR], [BN, BR]
            left, right = (wp, c) if WEIGHTS_LEFT else (c, wp)
            acc = tl.dot(left, tl.trans(right), acc)
    if WEIGHTS_LEFT:
        acc = tl.trans(acc)
    if BIAS:
        acc += tl.load(bias_ptr + col).to(tl.float32)[None, :]
    return acc
