"""Scales of rows, and what stands behind their codes. Letters as in passes.py."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .projection import sum_of_parts


@triton.jit
def exponent(v):
    """Return the smallest e with 2^e >= v > 0, from the bits of the float."""
    return ((v.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23) - 127


@triton.jit
def power(e):
    """Return 2^e as float32, -126 <= e <= 127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def e4m3(v):
    """Round v to float8_e4m3fn, half to even, as float32; |v| <= 448.

    By hand: converting back from FP8 went wrong on sm_90 with triton 3.6.
    """
    bits = v.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
    small = (v + 24576.0) - 24576.0  # to multiples of 2^-9
    return tl.where(tl.abs(v) < 0.015625, small, normal)


@triton.jit
def row_units(
    amax, peak, QMAX: tl.constexpr, UNIT: tl.constexpr, TINY: tl.constexpr,
    APPENDED: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Return per row: codes per unit of z, what a step is in units of the codes, and the scale."""
    some = (amax > TINY) | (amax != amax)
    inverse = tl.where(some, QMAX / tl.where(some, amax, 1.0), 0.0)
    scale = amax / QMAX
    if APPENDED:
        # Codes q 2^(6 + e - k) against weights q 2^-9, of which COUNTED are worth a scale; k makes
        # room for the row's largest coefficient, whose column 2 c COUNTED / (scale 2^(k + 3)) must
        # not pass FP8's 448.
        scale = tl.where(some, scale, tl.maximum(peak, TINY) / 256)
        k = tl.minimum(tl.maximum(exponent(peak / (scale * (1792 / COUNTED))), 0), 60)
        return inverse, power(6 - k), scale * power(3 + k) * (1 / COUNTED)
    else:
        return inverse, tl.full(amax.shape, UNIT, dtype=tl.float32), scale / UNIT


@triton.jit
def store_appended(
    p_codes, c, row_codes, m_m, scale, main, stride_codes, one,
    R: tl.constexpr, RP: tl.constexpr, RT: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Store behind the codes of rows that begin at row_codes (int64 [BM]): (high, low, high) of c
    [BM, RP] in float32 and of the bias's coefficient, and zeros up to the end."""
    unit = 2 / scale
    o_r = tl.arange(0, RP)[None, :]
    at = p_codes + row_codes[:, None] + main
    if R > 0:
        m_r = m_m[:, None] & (o_r < R)
        v = c * unit[:, None]
        high = e4m3(v)
        low = e4m3(v - high).to(p_codes.dtype.element_ty)
        high = high.to(p_codes.dtype.element_ty)
        tl.store(at + o_r, high, mask=m_r)
        tl.store(at + RT + o_r, low, mask=m_r)
        tl.store(at + 2 * RT + o_r, high, mask=m_r)
    # Chosen among as bytes: ptxas 12.8 packs an FP8 number wrongly beside itself, as among zeros.
    high = e4m3(one * unit)
    low = e4m3(one * unit - high).to(p_codes.dtype.element_ty).to(tl.int8, bitcast=True)
    high = high.to(p_codes.dtype.element_ty).to(tl.int8, bitcast=True)
    o_t = tl.arange(0, T)[None, :]
    v = tl.where(o_t // RT == 1, low[:, None], high[:, None])
    v = tl.where((o_t % RT == R) & (o_t < 3 * RT), v, 0)
    v = v.to(tl.int8).to(p_codes.dtype.element_ty, bitcast=True)
    rest = ((o_t % RT >= R) | (o_t >= 3 * RT)) & (main + o_t < stride_codes)
    tl.store(at + o_t, v, mask=m_m[:, None] & rest)


@triton.jit
def scale_rows(
    p_parts, p_squares, p_c, p_codes, p_scale, p_row, M, D, stride_codes, main, one,
    R: tl.constexpr, RP: tl.constexpr, LEAD: tl.constexpr, RT: tl.constexpr,
    APPENDED: tl.constexpr, T: tl.constexpr, PARTS: tl.constexpr, QMAX: tl.constexpr,
    UNIT: tl.constexpr, COUNTED: tl.constexpr, TOP: tl.constexpr, TINY: tl.constexpr,
    BM: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Compute c [M, RP] of its PARTS, each row's scale from its root mean square, and the appended
    columns.

    z = (x - c Pᵀ) H is as long as x less the first LEAD of c: rotations keep lengths, and P is
    orthonormal.
    p_row    float32 [2, M]: codes per unit of z, and what a step is in units of the codes
    p_squares  float32 [PARTS, M], the sums of x's squares
    T, one   as in ``round_rows``
    """
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = o_m < M
    if CHAIN:
        gdc_launch_dependents()
        gdc_wait()
    row = o_m.to(tl.int64)
    o_c = row[:, None] * RP + tl.arange(0, RP)[None, :]
    acc = sum_of_parts(p_parts, M, row, m_m, RP, PARTS)
    squares = tl.zeros((BM,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        squares += tl.load(p_squares + part * M + o_m, mask=m_m, other=0.0)
    c = acc.to(p_c.dtype.element_ty)
    tl.store(p_c + o_c, c, mask=m_m[:, None])
    c = c.to(tl.float32)
    # Where c holds all but 2^-14 of the length, the difference is nothing but P's rounding.
    out = tl.where(tl.arange(0, RP)[None, :] < LEAD, c, 0.0)
    rest = tl.maximum(squares - tl.sum(out * out, 1), squares * 0.00006103515625)
    top = TOP * tl.sqrt(rest / D)
    top = tl.where(squares != squares, squares, top)  # NaN shows
    peak = tl.maximum(tl.max(tl.abs(c), 1), one)
    inverse, unit, scale = row_units(top, peak, QMAX, UNIT, TINY, APPENDED, COUNTED)
    tl.store(p_row + o_m, inverse, mask=m_m)
    tl.store(p_row + M + o_m, unit, mask=m_m)
    tl.store(p_scale + o_m, scale, mask=m_m)
    if T > 0:
        store_appended(
            p_codes, c, row * stride_codes, m_m, scale, main, stride_codes, one, R, RP, RT, T
        )
