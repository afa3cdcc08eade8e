"""Triton kernels that make 8-bit codes of q, k and v; bound by memory.

Codes are stored head by head, filled up with zeros to whole blocks of ROWS tokens and HD channels,
so that the product needs no masks: q and k [B H, rows, HD]; v [B H, HD, rows], as Hopper's FP8
matrix units want their right operand, with tokens in the order of :func:`place`.

Letters: B batch, H heads, HD channels of a head rounded up to a power of two; D: the true number.
"""

import triton
import triton.language as tl

from ..transform_quantize.scales import e4m3
from .reference import E4M3_MAX, INT8_MAX, K_BLOCK, TINY

ROWS = tl.constexpr(K_BLOCK)
"""Tokens of a program of ``round_codes``, and of a block of k with one scale."""

CHUNKS = tl.constexpr(16)
"""Parts that a head's tokens are added up in."""

INT8 = tl.constexpr(INT8_MAX)
E4M3 = tl.constexpr(E4M3_MAX)
ZERO = tl.constexpr(TINY)


@triton.jit
def place(o_k):
    """Return the token at place ``o_k`` of v's codes: within every 16, bits h a q q b of
    the token number are at h q q a b.

    So a thread's logits in the accumulator of q kᵀ are, in their order, the P that it must hold as
    left operand of P v (FlashAttention-3, arXiv 2407.08608, section 3.3): see forward.py.
    """
    return o_k // 16 * 16 + (o_k // 2 % 2) * 8 + (o_k // 4 % 4) * 2 + o_k % 2


@triton.jit
def summarize(
    p_k, p_v, p_sums, S, H,
    k_batch, k_row, k_head, v_batch, v_row, v_head, chunk,
    D: tl.constexpr, HD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Add up what is asked of whole heads before anything is rounded, per chunk of tokens.

    p_sums  float32 [B H, 4, CHUNKS, HD]: Σ k, Σ v, max v, min v; a program writes k's or v's
    """
    head, part, of_v = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (head // H).to(tl.int64), head % H
    o_d = tl.arange(0, HD)
    m_d = (o_d < D)[None, :]
    o_out = ((head * 4).to(tl.int64) * CHUNKS + part) * HD + o_d
    first = part * chunk
    last = tl.minimum(first + chunk, S)
    total = tl.zeros((BS, HD), dtype=tl.float32)
    if of_v == 0:
        p_x = p_k + b * k_batch + h * k_head + o_d[None, :]
        for start in range(first, last, BS):
            o_s = start + tl.arange(0, BS)
            inside = (o_s < last)[:, None] & m_d
            x = tl.load(p_x + o_s.to(tl.int64)[:, None] * k_row, mask=inside, other=0.0)
            total += x.to(tl.float32)
        tl.store(p_sums + o_out, tl.sum(total, 0))
    else:
        high = tl.full((BS, HD), float("-inf"), dtype=tl.float32)
        low = tl.full((BS, HD), float("inf"), dtype=tl.float32)
        p_x = p_v + b * v_batch + h * v_head + o_d[None, :]
        for start in range(first, last, BS):
            o_s = start + tl.arange(0, BS)
            inside = (o_s < last)[:, None] & m_d
            x = tl.load(p_x + o_s.to(tl.int64)[:, None] * v_row, mask=inside, other=0.0)
            x = x.to(tl.float32)
            total += x
            high = tl.maximum(high, tl.where(inside, x, float("-inf")))
            low = tl.minimum(low, tl.where(inside, x, float("inf")))
        tl.store(p_sums + o_out + CHUNKS * HD, tl.sum(total, 0))
        tl.store(p_sums + o_out + 2 * CHUNKS * HD, tl.max(high, 0))
        tl.store(p_sums + o_out + 3 * CHUNKS * HD, tl.min(low, 0))


@triton.jit
def _inverse(amax, LARGEST: tl.constexpr):
    """Return codes per unit: 0 where all is zero, NaN where a NaN must show."""
    some = (amax > ZERO) | (amax != amax)
    return tl.where(some, LARGEST / tl.where(some, amax, 1.0), 0.0)


@triton.jit
def _rounded(x):
    """Round to the nearest integer, half to even; |x| < 2^22."""
    return ((x + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def _tile(p_x, rows, row_stride, m_x, o_d):
    """Load float32 [ROWS, HD]; 0 where the mask is off."""
    at = rows.to(tl.int64)[:, None] * row_stride + o_d[None, :]
    return tl.load(p_x + at, mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def _codes_of_q(p_q, p_q8, p_sq, q_row, first, T, row, factor, D: tl.constexpr, HD: tl.constexpr):
    o_n, o_d = tl.arange(0, ROWS), tl.arange(0, HD)
    x = _tile(p_q, first + o_n, q_row, (first + o_n < T)[:, None] & (o_d < D)[None, :], o_d)
    amax = tl.max(tl.abs(x), 1)
    # A NaN's code may be anything: the scale carries it on.
    amax = tl.where(tl.sum(x, 1) * 0.0 == 0.0, amax, float("nan"))
    codes = _rounded(x * _inverse(amax, INT8)[:, None])
    tl.store(p_q8 + row * HD + o_n[:, None] * HD + o_d[None, :], codes)
    tl.store(p_sq + row + o_n, amax / INT8 * factor)


@triton.jit
def _codes_of_k(p_k, p_sum, p_k8, p_sk, k_row, first, S, row, D: tl.constexpr, HD: tl.constexpr):
    o_n, o_d = tl.arange(0, ROWS), tl.arange(0, HD)
    m_x = (first + o_n < S)[:, None] & (o_d < D)[None, :]
    x = _tile(p_k, first + o_n, k_row, m_x, o_d)
    mean = tl.sum(tl.load(p_sum), 0) / S
    x = tl.where(m_x, x - mean[None, :], 0.0)
    amax = tl.max(tl.max(tl.abs(x), 1), 0)
    amax = tl.where(tl.sum(tl.sum(x, 1), 0) * 0.0 == 0.0, amax, float("nan"))
    codes = _rounded(x * _inverse(amax, INT8))
    tl.store(p_k8 + row * HD + o_n[:, None] * HD + o_d[None, :], codes)
    tl.store(p_sk, amax / INT8)


@triton.jit
def _codes_of_v(
    p_v, p_sum, p_v8, p_sv, p_mean, v_row, first, S, stride,
    D: tl.constexpr, HD: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    o_n, o_d = tl.arange(0, ROWS), tl.arange(0, HD)
    o_s = first + place(o_n)
    m_x = (o_s < S)[:, None] & (o_d < D)[None, :]
    x = _tile(p_v, o_s, v_row, m_x, o_d)
    mean = tl.sum(tl.load(p_sum + CHUNKS * HD), 0) / S
    high = tl.max(tl.load(p_sum + 2 * CHUNKS * HD), 0)
    low = tl.min(tl.load(p_sum + 3 * CHUNKS * HD), 0)
    amax = tl.maximum(tl.maximum(high - mean, mean - low), 0.0)  # past D: 0
    amax = tl.where(mean == mean, amax, mean)
    codes = tl.where(m_x, (x - mean[None, :]) * _inverse(amax, E4M3)[None, :], 0.0)
    if BY_HAND:
        codes = e4m3(codes)
    codes = tl.trans(codes.to(tl.float8e4nv))
    tl.store(p_v8 + o_d.to(tl.int64)[:, None] * stride + (first + o_n)[None, :], codes)
    if first == 0:
        tl.store(p_sv + o_d, amax / E4M3)
        tl.store(p_mean + o_d, mean)


@triton.jit
def round_codes(
    p_q, p_k, p_v, p_sums, p_q8, p_k8, p_v8, p_sq, p_sk, p_sv, p_mean, T, S, H,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    n_q, n_s, factor,
    D: tl.constexpr, HD: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """Round ROWS tokens of q (programs 0 ... n_q - 1 of a head), of k (n_s more) or v (n_s more).

    p_sums   from ``summarize``
    p_sq     float32 [B H, n_q ROWS]: with ``factor``, what logits are multiplied with
    p_sk     float32 [B H, n_s]
    p_sv     float32 [B H, HD]; p_mean too: v's mean
    BY_HAND  round to FP8 in steps: the interpreter's conversion is off where a carry grows the
             exponent
    """
    block, head = tl.program_id(0), tl.program_id(1)
    b, h, wide = (head // H).to(tl.int64), head % H, head.to(tl.int64)
    p_sum = p_sums + wide * (4 * CHUNKS * HD)
    p_sum += tl.arange(0, CHUNKS)[:, None] * HD + tl.arange(0, HD)[None, :]
    if block < n_q:
        p_q += b * q_batch + h * q_head
        row = (wide * n_q + block) * ROWS
        _codes_of_q(p_q, p_q8, p_sq, q_row, block * ROWS, T, row, factor, D, HD)
    elif block < n_q + n_s:
        p_k += b * k_batch + h * k_head
        at = wide * n_s + block - n_q
        first = (block - n_q) * ROWS
        _codes_of_k(p_k, p_sum, p_k8, p_sk + at, k_row, first, S, at * ROWS, D, HD)
    else:
        p_v += b * v_batch + h * v_head
        p_v8 += wide * HD * n_s * ROWS
        first = (block - n_q - n_s) * ROWS
        _codes_of_v(
            p_v, p_sum, p_v8, p_sv + wide * HD, p_mean + wide * HD, v_row, first, S, n_s * ROWS,
            D, HD, BY_HAND,
        )  # fmt: skip
