"""The Triton kernel of 8-bit attention: q8 k8ᵀ, online softmax, P v8.

One program computes BM queries of a head against all keys, BN at a time (FlashAttention,
arXiv 2205.14135). An element of P costs few instructions, since exponentials and the matrix units
share the time:

- The INT8 product starts from the bits of 1.5 2^23 and so ends as a float: an integer below 2^22
  stands in the fraction. Taking 1.5 2^23 off again rides in the one multiplication and
  addition that leads to the exponent, as do both scales, the row's maximum and P's factor 2^8.
- P's columns are renamed, not moved: the accumulator's layout of logits is, read in another order
  of keys, the register layout of an FP8 operand, and v's codes stand in that order (codes.py).
- Neither product needs masks: codes past the end are zeros. Only the last block's logits do.

Letters: T queries, S keys, H heads, HD channels of a head as stored; D: the true number.
"""

import triton
import triton.language as tl

from ..transform_quantize.scales import e4m3
from .codes import ROWS
from .reference import P_BITS

BITS = tl.constexpr(0x4B400000)
MAGIC = tl.constexpr(12582912.0)
"""1.5 2^23, as bits and as a number."""

UP = tl.constexpr(P_BITS)


@triton.jit
def _renamed(p, BM: tl.constexpr, BN: tl.constexpr):
    """Rename columns h a q q b (bits of their number, 16 at a time) to h q q a b: codes.place."""
    p = tl.reshape(p, (BM, BN // 16, 2, 4, 2))
    return tl.reshape(tl.permute(p, (0, 1, 3, 2, 4)), (BM, BN))


@triton.jit
def _logits(
    q, k_codes, row, start, HD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """Return 1.5 2^23 + q kᵀ of BN keys as the bits of a float32, int32 [BM, BN]."""
    if TMA:
        k = k_codes.load([row + start, 0])
    else:
        k = tl.load(k_codes + (start + tl.arange(0, BN))[:, None] * HD + tl.arange(0, HD)[None, :])
    bits = tl.full((BM, BN), BITS, dtype=tl.int32)
    return tl.dot(q, tl.trans(k), bits, out_dtype=tl.int32)


@triton.jit
def _soften(
    x, unit, total, peak, start, S,
    BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """Return P of BN keys in FP8, renamed; what earlier sums fade by; total and peak after them.

    unit  float32 [BM]: a logit's worth of the INT8 product's one
    """
    x = x.to(tl.float32, bitcast=True)
    if MASKED:
        live = (start + tl.arange(0, BN) < S)[None, :]
        x = tl.where(live, x, float("-inf"))
    higher = tl.maximum(peak, (tl.max(x, 1) - MAGIC) * unit)
    shift = tl.fma(unit, MAGIC, higher - UP)
    p = tl.exp2(tl.fma(x, unit[:, None], -shift[:, None]))
    if MASKED:  # not by -inf alone: the unit of an all-zero row or block is zero
        p = tl.where(live, p, 0.0)
    fade = tl.exp2(peak - higher)
    total = total * fade + tl.sum(p, 1)
    if BY_HAND:
        p = e4m3(p)
    return _renamed(p.to(tl.float8e4nv), BM, BN), fade, total, higher


@triton.jit
def _added(
    acc, p, fade, v_codes, row, start, stride,
    HD: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return acc fade + P v of BN keys, float32 [BM, HD]."""
    if TMA:
        v = v_codes.load([row, start])
    else:
        o_n = start + tl.arange(0, BN)
        v = tl.load(v_codes + tl.arange(0, HD)[:, None] * stride + o_n[None, :])
    return tl.dot(p, tl.trans(v), acc * fade[:, None])


@triton.jit
def forward(
    q_codes, k_codes, v_codes, p_sq, p_sk, p_sv, p_mean, p_y, T, S, H, n_q, n_s,
    y_batch, y_row, y_head,
    D: tl.constexpr, HD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
    EVEN: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """Compute y [BM, D] of one block of queries.

    q_codes  int8 [B H n_q ROWS, HD]; TMA: as a descriptor of blocks [BM, HD]
    k_codes  int8 [B H n_s ROWS, HD]; TMA: of blocks [BN, HD]
    v_codes  float8 [B H HD, n_s ROWS]; TMA: of blocks [HD, BN]
    n_q, n_s blocks of ROWS that queries and keys of a head fill
    EVEN     S is a multiple of BN
    """
    blocks = tl.cdiv(T, BM)
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h, wide = (head // H).to(tl.int64), head % H, head.to(tl.int64)
    o_m, o_d = block * BM + tl.arange(0, BM), tl.arange(0, HD)
    k_row, v_row, stride = head * n_s * ROWS, head * HD, n_s * ROWS
    if TMA:
        q = q_codes.load([head * n_q * ROWS + block * BM, 0])
    else:
        q = tl.load(q_codes + (wide * n_q * ROWS + o_m)[:, None] * HD + o_d[None, :])
        k_codes += wide * n_s * ROWS * HD
        v_codes += wide * HD * n_s * ROWS
    s_q = tl.load(p_sq + wide * n_q * ROWS + o_m)
    p_sk += wide * n_s

    acc = tl.zeros((BM, HD), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    peak = tl.full((BM,), float("-inf"), dtype=tl.float32)
    whole = S // BN * BN
    # Asked for a block early. Left to the compiler, it waits for one number and all its warps.
    s_k = tl.load(p_sk)
    for begin in range(0, whole, BN):
        start = tl.cast(begin, tl.int32)
        s_next = tl.load(p_sk + tl.minimum((start + BN) // ROWS, n_s - 1))
        x = _logits(q, k_codes, k_row, start, HD, BM, BN, TMA)
        p, fade, total, peak = _soften(x, s_q * s_k, total, peak, start, S, BM, BN, False, BY_HAND)
        acc = _added(acc, p, fade, v_codes, v_row, start, stride, HD, BN, TMA)
        s_k = s_next
    if not EVEN:
        x = _logits(q, k_codes, k_row, whole, HD, BM, BN, TMA)
        p, fade, total, peak = _soften(x, s_q * s_k, total, peak, whole, S, BM, BN, True, BY_HAND)
        acc = _added(acc, p, fade, v_codes, v_row, whole, stride, HD, BN, TMA)
    s_v, mean = tl.load(p_sv + wide * HD + o_d), tl.load(p_mean + wide * HD + o_d)
    y = tl.fma(acc * (1 / total)[:, None], s_v[None, :], mean[None, :])
    p_out = p_y + b * y_batch + h * y_head + o_m.to(tl.int64)[:, None] * y_row + o_d[None, :]
    tl.store(p_out, y.to(p_y.dtype.element_ty), mask=(o_m < T)[:, None] & (o_d < D)[None, :])
