"""Triton ``transform_quantize``, three sweeps:

    project     c = x P, and the spread basis P'' = (I (x) H_W)ᵀ P (``gather`` adds up its parts)
    rotate      z = (x - c Pᵀ) H in x's dtype, and the largest |z| of each row
    round_rows  codes and scales, and c as the GEMM wants it

H of blocks above W = 64 is H_W on the tensor cores, then a butterfly between neighbouring tiles of
W columns in registers (Sylvester: H_ab = H_a (x) H_b); the projection goes into the same
accumulator as -c P''ᵀ. Columns leave in R1 order because the columns of H_W are permuted that way
(kernels/planar.py). Its entries are +-1, exact in 16 bits; 1 / sqrt(b) comes last.

CHAIN: a sweep starts while the one before still runs (programmatic dependent launch, sm_90+) and
waits before it reads what that one wrote.

KIND: what happens to x on the way in (kernels/source.py), in float32 and rounded to 16 bits once,
so that c and z are of the same x. LayerNorm alone takes a sweep of its own, ``normalize``.

Letters: M rows (T of each image), D channels, K main-branch width, R protected directions (RP:
padded to a power of two, RT: columns of one part of the tail, kernels/tail.py).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .projection import read_columns, rotation


@triton.jit
def _spread_tile(
    p_spread, col, D, RP: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr
):
    """W rows of the spread basis, transposed: [RP, W]. In R1 order, they fill whole tiles."""
    o_d = col + tl.arange(0, W)
    o_p = o_d[None, :] * RP + tl.arange(0, RP)[:, None]
    if EVEN:
        return tl.load(p_spread + o_p).to(DOT)
    mask = (o_d < (D + W - 1) // W * W)[None, :]
    return tl.load(p_spread + o_p, mask=mask, other=0.0).to(DOT)


@triton.jit
def _tile(b_x, c, basis, turn, PROJECT: tl.constexpr):
    """W columns of (x - c Pᵀ) blockdiag(H_W) sqrt(W), before the butterfly: float32 [BM, W]."""
    y = tl.dot(b_x, turn)
    if PROJECT:
        y = tl.dot(c, basis, y)
    return y


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rotate(
    p_x, p_behind, p_c, p_spread, p_z, p_amax, M, T, D,
    image_x, stride_x, image_behind, stride_behind, split, stride_z, n_col, blocks, n_row, root,
    B: tl.constexpr, W: tl.constexpr, SUB: tl.constexpr, RP: tl.constexpr,
    PROJECT: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, DOT: tl.constexpr,
    CHAIN: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """z [M, stride_z] in R1 order, and amax [M] int32: the bits of each row's largest |z|.

    A program keeps four tiles of columns, with their basis, and walks down the rows. Bits of floats
    >= 0 order as they do, and NaN above all of them. root  1 / sqrt(b); the rest as in ``project``
    """
    pid = tl.program_id(0)
    col = (pid % n_col) * (4 * W)
    if KIND == "concat":
        if col < split:
            _walk(
                p_x, p_c, p_spread, p_z, p_amax, T, D, image_x, stride_x, stride_z, n_col, blocks,
                n_row, root, col, False, B, W, SUB, RP, PROJECT, EVEN, BM, DOT, CHAIN, FAST,
            )  # fmt: skip
        else:
            _walk(
                p_behind - split, p_c, p_spread, p_z, p_amax, T, D, image_behind, stride_behind,
                stride_z, n_col, blocks, n_row, root, col, True, B, W, SUB, RP, PROJECT, EVEN, BM,
                DOT, CHAIN, FAST,
            )  # fmt: skip
    else:
        _walk(
            p_x, p_c, p_spread, p_z, p_amax, T, D, image_x, stride_x, stride_z, n_col, blocks,
            n_row, root, col, KIND == "gelu", B, W, SUB, RP, PROJECT, EVEN, BM, DOT, CHAIN, FAST,
        )  # fmt: skip


@triton.jit
def _walk(
    p_x, p_c, p_spread, p_z, p_amax, T, D, image_x, stride_x, stride_z, n_col, blocks, n_row, root,
    col,
    GELU: tl.constexpr, B: tl.constexpr, W: tl.constexpr, SUB: tl.constexpr, RP: tl.constexpr,
    PROJECT: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, DOT: tl.constexpr,
    CHAIN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The columns of one program of ``rotate``, down the rows."""
    turn = rotation(B, W, False).to(DOT)
    if CHAIN:
        gdc_launch_dependents()
        gdc_wait()
    basis0, basis1, basis2, basis3 = turn, turn, turn, turn
    if PROJECT:
        basis0 = _spread_tile(p_spread, col, D, RP, W, EVEN, DOT)
        basis1 = _spread_tile(p_spread, col + W, D, RP, W, EVEN, DOT)
        basis2 = _spread_tile(p_spread, col + 2 * W, D, RP, W, EVEN, DOT)
        basis3 = _spread_tile(p_spread, col + 3 * W, D, RP, W, EVEN, DOT)
    o_d = col + tl.arange(0, W)
    for block in range(tl.program_id(0) // n_col, n_row, tl.num_programs(0) // n_col):
        # Rows last to first: what ``project`` read last is still in L2.
        index = n_row - 1 - block
        image = (index // blocks).to(tl.int64)
        o_t = (index % blocks) * BM + tl.arange(0, BM)
        m_m = o_t < T
        o_m = image * T + o_t
        x_row = image * image_x + o_t.to(tl.int64) * stride_x
        if PROJECT:
            o_c = o_m[:, None] * RP + tl.arange(0, RP)[None, :]
            b_c = tl.load(p_c + o_c, mask=m_m[:, None], other=0.0).to(DOT)
        else:
            b_c = turn
        x0 = read_columns(p_x, x_row, m_m, o_d, D, GELU, EVEN, FAST, DOT)
        y0 = _tile(x0, b_c, basis0, turn, PROJECT)
        x1 = read_columns(p_x, x_row, m_m, o_d + W, D, GELU, EVEN, FAST, DOT)
        y1 = _tile(x1, b_c, basis1, turn, PROJECT)
        x2 = read_columns(p_x, x_row, m_m, o_d + 2 * W, D, GELU, EVEN, FAST, DOT)
        y2 = _tile(x2, b_c, basis2, turn, PROJECT)
        x3 = read_columns(p_x, x_row, m_m, o_d + 3 * W, D, GELU, EVEN, FAST, DOT)
        y3 = _tile(x3, b_c, basis3, turn, PROJECT)
        if SUB > 1:
            y0, y1 = y0 + y1, y0 - y1
            y2, y3 = y2 + y3, y2 - y3
        if SUB > 2:
            y0, y2 = y0 + y2, y0 - y2
            y1, y3 = y1 + y3, y1 - y3
        largest = _nan_max(_nan_max(tl.abs(y0), tl.abs(y1)), _nan_max(tl.abs(y2), tl.abs(y3)))
        row = tl.reduce(largest, 1, _nan_max) * root
        tl.atomic_max(p_amax + o_m, row.to(tl.int32, bitcast=True), mask=m_m)
        z = p_z + o_m[:, None] * stride_z + col
        _store(z, y0 * root, m_m, stride_z - col, W, EVEN)
        _store(z + W, y1 * root, m_m, stride_z - col - W, W, EVEN)
        _store(z + 2 * W, y2 * root, m_m, stride_z - col - 2 * W, W, EVEN)
        _store(z + 3 * W, y3 * root, m_m, stride_z - col - 3 * W, W, EVEN)


@triton.jit
def _store(p_z, value, m_m, room, W: tl.constexpr, EVEN: tl.constexpr):
    o_d = tl.arange(0, W)[None, :]
    mask = m_m[:, None]
    if not EVEN:
        mask = mask & (o_d < room)
    tl.store(p_z + o_d, value.to(p_z.dtype.element_ty), mask=mask)


@triton.jit
def _exponent(v):
    """Smallest e with 2^e >= v > 0, from the bits of the float."""
    return ((v.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23) - 127


@triton.jit
def _power(e):
    """2^e as float32, -126 <= e <= 127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def e4m3(v):
    """v rounded to float8_e4m3fn, half to even, as float32; |v| <= 448.

    By hand: converting back from FP8 went wrong on sm_90 with triton 3.6.
    """
    bits = v.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
    small = (v + 24576.0) - 24576.0  # to multiples of 2^-9
    return tl.where(tl.abs(v) < 0.015625, small, normal)


@triton.jit
def _row_units(
    p_amax, peak, o_m, m_m, QMAX: tl.constexpr, UNIT: tl.constexpr, TINY: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Per row: codes per unit of z, what a step is in units of the codes, and the scale."""
    amax = tl.load(p_amax + o_m, mask=m_m, other=0).to(tl.float32, bitcast=True)
    some = (amax > TINY) | (amax != amax)
    inverse = tl.where(some, QMAX / tl.where(some, amax, 1.0), 0.0)
    scale = amax / QMAX
    if TAIL:
        # Codes q 2^(6 + e - k) against weights q 2^-9; k makes room for the row's largest
        # coefficient, whose column 2 c / (scale 2^(k + 3)) must not pass FP8's 448.
        scale = tl.where(some, scale, tl.maximum(peak, TINY) / 256)
        k = tl.minimum(tl.maximum(_exponent(peak / (scale * 1792)), 0), 60)
        return inverse, _power(6 - k), scale * _power(3 + k)
    else:
        return inverse, tl.full(amax.shape, UNIT, dtype=tl.float32), scale / UNIT


@triton.jit
def round_rows(
    p_z, p_c, p_amax, p_codes, p_scale, M, K, stride_z, stride_codes, stride_scale, tail, n_col,
    one,
    R: tl.constexpr, RP: tl.constexpr, RT: tl.constexpr, TAIL: tl.constexpr, T: tl.constexpr,
    SCALE: tl.constexpr,
    G: tl.constexpr, QMAX: tl.constexpr, UNIT: tl.constexpr, LEVELS: tl.constexpr,
    CLIP: tl.constexpr, TINY: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    """Codes [M, padded(K)] in R1 order and scales; the last of n_col programs writes the tail.

    TAIL codes stand in the units of a product with a tail, however many columns that has
    T    columns of the tail, padded to a power of two (0: none)
    one  coefficient of the bias, which is the tail's direction R; 0 without a bias
    """
    # Adding 1.5 2^23 leaves no fraction bits: round half to even. Subtracting it again rides in the
    # multiplication by a power of two, so that nothing is rounded twice.
    MAGIC: tl.constexpr = 12582912.0
    pid = tl.program_id(0)
    if CHAIN:
        gdc_wait()
    o_m = (pid // n_col) * BM + tl.arange(0, BM)
    m_m = o_m < M
    row_codes = o_m.to(tl.int64) * stride_codes
    inverse = tl.zeros((BM,), dtype=tl.float32)
    unit = inverse
    if SCALE != "group":
        peak = inverse + one
        if TAIL and R > 0:
            o_c = o_m.to(tl.int64)[:, None] * RP + tl.arange(0, RP)[None, :]
            b_c = tl.load(p_c + o_c, mask=m_m[:, None], other=0.0).to(tl.float32)
            peak = tl.maximum(tl.max(tl.abs(b_c), 1), peak)
        inverse, unit, scale = _row_units(p_amax, peak, o_m, m_m, QMAX, UNIT, TINY, TAIL)
        if pid % n_col == 0:
            tl.store(p_scale + o_m, scale, mask=m_m)
        if T > 0 and pid % n_col == n_col - 1:
            o_t = tl.arange(0, T)
            part = o_t // RT
            o_r = o_t % RT
            o_v = o_m.to(tl.int64)[:, None] * RP + o_r[None, :]
            m_v = m_m[:, None] & ((o_r < R) & (part < 3))[None, :]
            v = tl.load(p_c + o_v, mask=m_v, other=0.0).to(tl.float32)
            v = tl.where(((o_r == R) & (part < 3))[None, :], one, v) * (2 / scale)[:, None]
            high = e4m3(v)
            v = tl.where((part == 1)[None, :], v - high, high)
            m_t = m_m[:, None] & (tail + o_t < stride_codes)[None, :]
            p_tail = p_codes + row_codes[:, None] + (tail + o_t)[None, :]
            tl.store(p_tail, v.to(p_codes.dtype.element_ty), mask=m_t)
    col = (pid % n_col) * BW
    o_k = col + tl.arange(0, BW)
    m_k = m_m[:, None] & (o_k < tail)[None, :]
    o_z = o_m.to(tl.int64)[:, None] * stride_z + o_k[None, :]
    z = tl.load(p_z + o_z, mask=m_k, other=0.0).to(tl.float32)
    # [BM, groups, parity, column]: below 64 columns, R1 order splits a group in even and odd ones.
    HALF: tl.constexpr = 2 if G < 64 else 1
    BLOCKS: tl.constexpr = BW // (G if G > 64 else 64)
    INNER: tl.constexpr = 64 // G if G < 64 else 1
    z = tl.reshape(z, (BM, BLOCKS, HALF, INNER, G // HALF))
    if SCALE == "token":
        q = tl.fma(z, _rows(inverse), MAGIC)
        step = _rows(unit)
    else:
        if SCALE == "pow2":
            amax = tl.max(tl.max(tl.abs(z), 4), 2)  # [BM, BLOCKS, INNER]
            share = amax * (inverse * (CLIP / QMAX))[:, None, None]
            e = tl.minimum(tl.maximum(_exponent(share), -LEVELS), 0)
            factor = _power(-e) * inverse[:, None, None]
            step = _groups(_power(e) * unit[:, None, None])
        else:
            # No row scale will carry a NaN on: a group's own must.
            amax = tl.reduce(tl.reduce(tl.abs(z), 4, _nan_max), 2, _nan_max)
            some = amax > TINY
            factor = tl.where(some, QMAX / tl.where(some, amax, 1.0), 0.0)
            step = 1.0
            o_g = (col // G) + tl.arange(0, BLOCKS * INNER)
            m_g = m_m[:, None] & (o_g * G < K)[None, :]
            o_s = o_m.to(tl.int64)[:, None] * stride_scale + o_g[None, :]
            tl.store(p_scale + o_s, tl.reshape(amax / QMAX, (BM, BLOCKS * INNER)), mask=m_g)
        q = tl.fma(z, _groups(factor), MAGIC)
    q = tl.minimum(tl.maximum(q, MAGIC - QMAX), MAGIC + QMAX)
    q = tl.reshape((q - MAGIC) * step, (BM, BW))
    o_q = row_codes[:, None] + o_k[None, :]
    tl.store(p_codes + o_q, q.to(p_codes.dtype.element_ty), mask=m_k)


@triton.jit
def _rows(v):
    """[BM] -> [BM, 1, 1, 1, 1]"""
    return v[:, None, None, None, None]


@triton.jit
def _groups(v):
    """[BM, BLOCKS, INNER] -> [BM, BLOCKS, 1, INNER, 1]"""
    return v[:, :, None, :, None]
