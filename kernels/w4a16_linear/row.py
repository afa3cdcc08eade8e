"""One row of ``w4a16_linear`` a program: multiply-adds in float32.

Weights are read as 32-bit words of eight codes, as in kernel.py. One instruction makes an INT4 code
a float32 under the exponent of 128 or 2048; the offsets are taken off the sums. LM4's come from
tables as bf16, which is a float32's upper half.

Letters: M rows, N outputs, K inputs; W words of a step (8 W columns), BN outputs of a
program.
"""

import triton
import triton.language as tl

from ..lm4_lookup import lm4_pair, lm4_planes, lm4_tables

HIGH = 0x43080000
"""float32 128 + 8 with the code's bits at 16 ... 19: codes -8 ... 7 are 136 + code."""
LOW = 0x45008000
"""float32 2048 + 8 with the code's bits at 12 ... 15: codes are 2056 + code."""


@triton.jit
def parts(x, SHAPE: tl.constexpr):
    """Split x in ``SHAPE`` (..., 2, 2, 2) by columns i, i + 4 of a word, i = 0 ... 3: (..., 2)."""
    even, odd = tl.split(tl.reshape(x, SHAPE))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _columns(pair):
    """Split [W, 2] into two [1, W] in float32."""
    first, second = tl.split(pair)
    return first.to(tl.float32)[None, :], second.to(tl.float32)[None, :]


@triton.jit
def _float(bits, MASK: tl.constexpr, magic):
    """Make the code under MASK in every word a float32, plus the offset of ``magic``."""
    return ((bits & MASK) ^ magic).to(tl.float32, bitcast=True)


@triton.jit
def _first(pair):
    """Make the lower bf16 of every word a float32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _second(pair):
    """Make the upper one a float32."""
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def one_row(
    p_x, p_w, p_scale, p_bias, p_y, N, units, x_stride, y_stride, scale_stride, high, low,
    UNIT: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr,
    LM4: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute y of one row and BN outputs: 16 bytes a thread.

    units    words of a weight row / UNIT; UNIT 4 says that rows are whole 16 bytes
    GROUP    words of a group, a multiple of 4; 0: one scale per row

    Taking INT4's offsets off rounds by up to 2056 * 2^-24 (about 1e-4) of |x| times the scale, far
    below what rounding an output to 16 bits costs, even where the code itself is 0.
    """
    m = tl.program_id(1).to(tl.int64)
    p_x += m * x_stride
    p_y += m * y_stride
    words = units * UNIT
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    n = tl.minimum(o_n, N - 1).to(tl.int64)
    acc = tl.zeros([BN, W // 4], tl.float32)
    if LM4:
        tables = lm4_tables(N, False)
    for start in tl.range(0, words, W, num_stages=STAGES):
        o_w = start + tl.arange(0, W)
        o_k = start * 8 + tl.arange(0, 8 * W)
        at = p_w + (n * words)[:, None] + o_w[None, :]
        if EVEN:
            w = tl.load(at, eviction_policy="evict_first")  # [BN, W]
            x = tl.load(p_x + o_k)  # [8 W]
        else:
            w = tl.load(at, mask=(o_w < words)[None, :], other=0)
            x = tl.load(p_x + o_k, mask=o_k < words * 8, other=0.0)
        if GROUP > 0:
            o_g = start // GROUP + tl.arange(0, W // 4) // (GROUP // 4)
            if W % GROUP != 0:  # a step may start inside of a group
                o_g = (start // 4 + tl.arange(0, W // 4)) // (GROUP // 4)
            scale_at = p_scale + (n * scale_stride)[:, None] + o_g[None, :]
            if EVEN:
                s = tl.load(scale_at)  # [BN, W / 4]
            else:
                s = tl.load(scale_at, mask=(o_g * GROUP < words)[None, :], other=0.0)
        if LM4:  # here, or its parts change hands as 16-bit numbers, four times as many reads
            x = x.to(tl.float32)
        x04, x15, x26, x37 = parts(x, [W, 2, 2, 2])
        x0, x4 = _columns(x04)
        x1, x5 = _columns(x15)
        x2, x6 = _columns(x26)
        x3, x7 = _columns(x37)
        if LM4:
            head, head_high, tail, tail_high = lm4_planes(w, tables)
            pair = lm4_pair(head, head_high, False)
            p = _first(pair) * x0
            p += _second(pair) * x1
            pair = lm4_pair(head, head_high, True)
            p += _first(pair) * x2
            p += _second(pair) * x3
            pair = lm4_pair(tail, tail_high, False)
            p += _first(pair) * x4
            p += _second(pair) * x5
            pair = lm4_pair(tail, tail_high, True)
            p += _first(pair) * x6
            p += _second(pair) * x7
        else:
            # Two codes of every shifted word stand where they are wanted: four shifts for eight.
            left, right = w << 8, w >> 12
            p = _float(w << 16, 0xF0000, high) * x0
            p -= (x0 + x2 + x4 + x5 + x7) * 136.0 + (x1 + x3 + x6) * 2056.0
            p += _float(left, 0xF000, low) * x1
            p += _float(left, 0xF0000, high) * x2
            p += _float(w, 0xF000, low) * x3
            p += _float(w, 0xF0000, high) * x4
            p += _float(w >> 4, 0xF0000, high) * x5
            p += _float(right, 0xF000, low) * x6
            p += _float(right, 0xF0000, high) * x7
        p4 = tl.sum(tl.reshape(p, [BN, W // 4, 4]), 2)
        if GROUP > 0:
            acc += p4 * s.to(tl.float32)
        else:
            acc += p4
    y = tl.sum(acc, 1)
    if GROUP == 0:
        y *= tl.load(p_scale + n * scale_stride).to(tl.float32)
    if BIAS:
        y += tl.load(p_bias + n).to(tl.float32)
    tl.store(p_y + o_n, y.to(p_y.dtype.element_ty), mask=o_n < N)
