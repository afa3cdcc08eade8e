"""Triton ``transform_quantize``, three passes:

    project     c = x P, and the spread basis P'' = (I (x) H_W)ᵀ P (``gather`` adds up its parts)
    rotate      z = (x - c Pᵀ) H in x's dtype, and the largest |z| of each row
    round_rows  codes and scales, and c as the GEMM wants it

or, with scales of a row's root mean square, two and a short one:

    project     the same, and the sums of x's squares
    scale_rows  c of its parts, scales, and c as the GEMM wants it
    rotate      codes of z, which is never written down

H of blocks above W = 64 is H_W on the tensor cores, then a butterfly between neighbouring tiles of
W columns in registers (Sylvester: H_ab = H_a (x) H_b); the projection goes into the same
accumulator as -c P''ᵀ. Columns leave in R1 order because the columns of H_W are permuted that way
(kernels/permuted.py). Its entries are +-1, exact in 16 bits; 1 / sqrt(b) comes last.

CHAIN: a pass starts while the one before still runs (programmatic dependent launch, sm_90+) and
waits before it reads what that one wrote.

KIND, GELU: what happens to x on the way in (kernels/prologue.py), in float32 and rounded to 16 bits
once, so that c and z are of the same x.

Letters: M rows (T of each image), D channels, K main-branch width, R directions of c, of which the
first are projected out (RP and LP: both padded to a power of two, RT: columns of one part of the
appended columns, kernels/appended.py).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .order import renamed, rotation, row_at
from .projection import activated, read_columns
from .scales import e4m3, exponent, power, row_units, store_appended


@triton.jit
def _spread(
    p_spread, col, D, LP: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Read COLUMNS rows of the spread basis, transposed: [LP, COLUMNS]. They fill whole tiles."""
    o_d = col + tl.arange(0, COLUMNS)
    o_p = o_d[None, :] * LP + tl.arange(0, LP)[:, None]
    if EVEN:
        return tl.load(p_spread + o_p).to(DOT)
    mask = (o_d < (D + W - 1) // W * W)[None, :]
    return tl.load(p_spread + o_p, mask=mask, other=0.0).to(DOT)


@triton.jit
def _tile(x, c, basis, turn, PROJECT: tl.constexpr):
    """Compute W columns of (x - c Pᵀ) blockdiag(H_W) sqrt(W), before the butterfly: float32."""
    y = tl.dot(x, turn)
    if PROJECT:
        y = tl.dot(c, basis, y)
    return y


@triton.jit
def _stacked_tiles(
    p_x, x_rows, m_x, o_d, D, c, basis, turn,
    PROJECT: tl.constexpr, GELU: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Compute four tiles at once, each float32 [BM, W]: x_rows (int64 [4 BM]) are the rows of the
    first tile, then those of the second, and so on; basis [LP, 4 W].

    Hopper's products run beside their warps, which Triton makes wait for each: two products are two
    waits, where tile by tile there are eight. Taking turns is only words: a thread's part of the
    stacked product, [4 BM, W], is its part of the wide one, [BM, 4 W].
    """
    mask = m_x[:, None]
    if not EVEN:
        mask = mask & (o_d < D)
    x = activated(tl.load(p_x + x_rows[:, None] + o_d, mask=mask, other=0.0), GELU, FAST, DOT)
    if FAST and not GELU:
        # Through registers: in shared memory, x has to stay until the product ends, in a third
        # buffer, and a second program has no room. The xor is with 0, which ptxas learns late:
        # where loads end in a product's registers it makes them wait for each other.
        x = tl.inline_asm_elementwise(
            "{ .reg .b32 t; mov.u32 t, %laneid; shr.u32 t, t, 5; xor.b32 $0, $1, t; }",
            "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    BM: tl.constexpr = x.shape[0] // 4
    W: tl.constexpr = x.shape[1]
    y = tl.permute(tl.reshape(tl.dot(x, turn), (4, BM, W)), (1, 0, 2))
    y = tl.reshape(y, (BM, 4 * W))
    if PROJECT:
        y = tl.dot(c, basis, y)
    y01, y23 = tl.split(tl.permute(tl.reshape(y, (BM, 2, 2, W)), (0, 3, 2, 1)))
    y0, y1 = tl.split(y01)
    y2, y3 = tl.split(y23)
    return y0, y1, y2, y3


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rotate(
    p_x, p_c, p_spread, p_z, p_amax, p_row, M, T, D,
    image_x, stride_x, stride_z, columns, n_col, blocks, n_row, root,
    B: tl.constexpr, W: tl.constexpr, SUB: tl.constexpr, RP: tl.constexpr, LP: tl.constexpr,
    PROJECT: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, DOT: tl.constexpr,
    CHAIN: tl.constexpr, GELU: tl.constexpr, FAST: tl.constexpr, STACKED: tl.constexpr,
    G: tl.constexpr, QMAX: tl.constexpr, LEVELS: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """Compute z [M, columns] in R1 order, and amax [M] int32: the bits of each row's largest |z|.

    G  not 0: codes in place of z, in groups of so many, by what ``scale_rows`` left in p_row

    A program keeps four tiles of columns, with their basis, and walks down the rows. Bits of floats
    >= 0 order as they do, and NaN above all of them. root  1 / sqrt(b); the rest as in ``project``
    """
    col = (tl.program_id(0) % n_col) * (4 * W)
    turn = rotation(B, W, False).to(DOT)
    if CHAIN:
        gdc_launch_dependents()
        gdc_wait()
    basis0, basis1, basis2, basis3 = turn, turn, turn, turn
    if PROJECT and STACKED:
        basis0 = _spread(p_spread, col, D, LP, W, EVEN, 4 * W, DOT)
    elif PROJECT:
        basis0 = _spread(p_spread, col, D, LP, W, EVEN, W, DOT)
        basis1 = _spread(p_spread, col + W, D, LP, W, EVEN, W, DOT)
        basis2 = _spread(p_spread, col + 2 * W, D, LP, W, EVEN, W, DOT)
        basis3 = _spread(p_spread, col + 3 * W, D, LP, W, EVEN, W, DOT)
    o_d = col + tl.arange(0, W)
    for block in range(tl.program_id(0) // n_col, n_row, tl.num_programs(0) // n_col):
        # Rows last to first: what ``project`` read last is still in L2.
        index = n_row - 1 - block
        image = (index // blocks).to(tl.int64)
        first = (index % blocks) * BM
        o_t = first + tl.arange(0, BM)
        m_m = o_t < T
        if PROJECT:
            o_c = (image * T + o_t)[:, None] * RP + tl.arange(0, LP)[None, :]
            b_c = tl.load(p_c + o_c, mask=m_m[:, None], other=0.0).to(DOT)
        else:
            b_c = turn
        if STACKED:
            o_x = tl.arange(0, 4 * BM)
            o_t = first + o_x % BM
            x_rows = image * image_x + o_t.to(tl.int64) * stride_x
            y0, y1, y2, y3 = _stacked_tiles(
                p_x, x_rows, o_t < T, (o_x // BM * W)[:, None] + o_d[None, :], D, b_c, basis0, turn,
                PROJECT, GELU, EVEN, FAST, DOT,
            )  # fmt: skip
        else:
            x_row = image * image_x + o_t.to(tl.int64) * stride_x
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
        y0, y1, y2, y3 = renamed(y0), renamed(y1), renamed(y2), renamed(y3)
        o_t = first + row_at(BM)
        m_m = o_t < T
        o_m = image * T + o_t
        z = p_z + o_m[:, None] * stride_z + col
        if G > 0:
            factor = tl.load(p_row + o_m, mask=m_m, other=0.0) * root
            unit = tl.load(p_row + M + o_m, mask=m_m, other=0.0)
            y0 = _codes(y0, factor, unit, FAST, W, G, QMAX, LEVELS, CLIP)
            _store(z, y0, m_m, columns - col, W, EVEN)
            y1 = _codes(y1, factor, unit, FAST, W, G, QMAX, LEVELS, CLIP)
            _store(z + W, y1, m_m, columns - col - W, W, EVEN)
            y2 = _codes(y2, factor, unit, FAST, W, G, QMAX, LEVELS, CLIP)
            _store(z + 2 * W, y2, m_m, columns - col - 2 * W, W, EVEN)
            y3 = _codes(y3, factor, unit, FAST, W, G, QMAX, LEVELS, CLIP)
            _store(z + 3 * W, y3, m_m, columns - col - 3 * W, W, EVEN)
        else:
            largest = _nan_max(_nan_max(tl.abs(y0), tl.abs(y1)), _nan_max(tl.abs(y2), tl.abs(y3)))
            row = tl.reduce(largest, 1, _nan_max) * root
            tl.atomic_max(p_amax + o_m, row.to(tl.int32, bitcast=True), mask=m_m)
            _store(z, y0 * root, m_m, columns - col, W, EVEN)
            _store(z + W, y1 * root, m_m, columns - col - W, W, EVEN)
            _store(z + 2 * W, y2 * root, m_m, columns - col - 2 * W, W, EVEN)
            _store(z + 3 * W, y3 * root, m_m, columns - col - 3 * W, W, EVEN)


@triton.jit
def _store(p_z, value, m_m, room, W: tl.constexpr, EVEN: tl.constexpr):
    o_d = tl.arange(0, W)[None, :]
    mask = m_m[:, None]
    if not EVEN:
        mask = mask & (o_d < room)
    tl.store(p_z + o_d, value.to(p_z.dtype.element_ty), mask=mask)


@triton.jit
def _clamped(v, QMAX: tl.constexpr):
    """Clamp v to +-QMAX; an FP8 code knows NaN."""
    v = tl.maximum(v, -1.0 * QMAX, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, 1.0 * QMAX, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _codes(
    y, factor, unit, FAST: tl.constexpr, W: tl.constexpr,
    G: tl.constexpr, QMAX: tl.constexpr, LEVELS: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """Return codes of y [BM, W] in units of the product; y times ``factor`` is z in steps.

    G  channels that share a power of two; 1: each number has its own, it is an E4M3 float, which
       the store rounds (right, if FAST: not so when interpreted)
    """
    if G == 1:
        v = _clamped(y * factor[:, None], QMAX) * unit[:, None]
        return v if FAST else e4m3(v)
    else:
        BM: tl.constexpr = y.shape[0]
        MAGIC: tl.constexpr = 12582912.0  # as in ``round_rows``
        # [BM, blocks, parity, groups, column]: R1 order splits a group in even and odd columns.
        HALF: tl.constexpr = 2 if G < 64 else 1
        y = tl.reshape(y, (BM, W // 64, HALF, 64 // G, G // HALF))
        share = tl.max(tl.max(tl.abs(y), 4), 2) * (factor * (CLIP / QMAX))[:, None, None]
        # 2^e of ``exponent`` and its inverse without leaving the float's bits: this is the pass
        # that instructions bound.
        up = ((share.to(tl.int32, bitcast=True) + 0x7FFFFF) & -8388608).to(tl.float32, bitcast=True)
        up = tl.minimum(tl.maximum(up, 1.0 / (1 << LEVELS)), 1.0)
        down = (0x7F000000 - up.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        q = tl.fma(y, _groups(down * factor[:, None, None]), MAGIC)
        q = tl.minimum(tl.maximum(q, MAGIC - QMAX), MAGIC + QMAX)
        step = up * unit[:, None, None]  # powers of two: nothing below is rounded
        return tl.reshape(tl.fma(q, _groups(step), _groups(-MAGIC * step)), (BM, W))


@triton.jit
def round_rows(
    p_z, p_c, p_amax, p_codes, p_scale, M, K, stride_z, stride_codes, stride_scale, main, n_col,
    one,
    R: tl.constexpr, RP: tl.constexpr, RT: tl.constexpr, APPENDED: tl.constexpr, T: tl.constexpr,
    SCALE: tl.constexpr,
    G: tl.constexpr, QMAX: tl.constexpr, UNIT: tl.constexpr, LEVELS: tl.constexpr,
    CLIP: tl.constexpr, COUNTED: tl.constexpr, TINY: tl.constexpr, BM: tl.constexpr,
    BW: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Compute codes [M, padded(K)] in R1 order and scales; the last of n_col programs writes what
    is appended.

    APPENDED codes stand in the units of a product with appended columns, however many there are
    T    columns appended, padded to a power of two (0: none)
    one  coefficient of the bias, which is the appended direction R; 0 without a bias
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
        b_c = tl.zeros((BM, RP), dtype=tl.float32)
        if APPENDED and R > 0:
            o_c = o_m.to(tl.int64)[:, None] * RP + tl.arange(0, RP)[None, :]
            b_c = tl.load(p_c + o_c, mask=m_m[:, None], other=0.0).to(tl.float32)
            peak = tl.maximum(tl.max(tl.abs(b_c), 1), peak)
        amax = tl.load(p_amax + o_m, mask=m_m, other=0).to(tl.float32, bitcast=True)
        inverse, unit, scale = row_units(amax, peak, QMAX, UNIT, TINY, APPENDED, COUNTED)
        if pid % n_col == 0:
            tl.store(p_scale + o_m, scale, mask=m_m)
        if T > 0 and pid % n_col == n_col - 1:
            store_appended(
                p_codes, b_c, row_codes, m_m, scale, main, stride_codes, one, R, RP, RT, T
            )
    col = (pid % n_col) * BW
    o_k = col + tl.arange(0, BW)
    m_k = m_m[:, None] & (o_k < main)[None, :]
    o_z = o_m.to(tl.int64)[:, None] * stride_z + o_k[None, :]
    z = tl.load(p_z + o_z, mask=m_k, other=0.0).to(tl.float32)
    # [BM, groups, parity, column]: below 64 columns, R1 order splits a group in even and odd ones.
    HALF: tl.constexpr = 2 if G < 64 else 1
    BLOCKS: tl.constexpr = BW // (G if G > 64 else 64)
    INNER: tl.constexpr = 64 // G if G < 64 else 1
    z = tl.reshape(z, (BM, BLOCKS, HALF, INNER, G // HALF))
    if SCALE == "float":
        q = _clamped(z * _rows(inverse), QMAX)
        step = _rows(unit)
    elif SCALE == "token":
        q = tl.fma(z, _rows(inverse), MAGIC)
        step = _rows(unit)
    else:
        if SCALE == "pow2":
            amax = tl.max(tl.max(tl.abs(z), 4), 2)  # [BM, BLOCKS, INNER]
            share = amax * (inverse * (CLIP / QMAX))[:, None, None]
            e = tl.minimum(tl.maximum(exponent(share), -LEVELS), 0)
            factor = power(-e) * inverse[:, None, None]
            step = _groups(power(e) * unit[:, None, None])
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
    if SCALE != "float":
        q = tl.minimum(tl.maximum(q, MAGIC - QMAX), MAGIC + QMAX) - MAGIC
    q = tl.reshape(q * step, (BM, BW))
    if SCALE == "float":
        q = e4m3(q)
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
