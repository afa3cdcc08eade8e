"""What ``transform_quantize`` does first (passes.py tells of all): c = x P, and the spread basis.

Letters as there.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .order import rotation


@triton.jit
def _gelu(v, FAST: tl.constexpr):
    """Compute GELU by its tanh approximation, float32. FAST: the hardware's, right to 2^-11, far
    below what rounding the result to bf16 costs a row."""
    u = v * (0.7978845608028654 + 0.035677408136300125 * (v * v))
    if FAST:
        turn = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        turn = 1 - 2 / (1 + tl.exp(2 * u))
    half = 0.5 * v
    return half + half * turn


@triton.jit
def _gelu_pairs(v):
    """Compute :func:`_gelu` of bf16, two at a time, from h = v / 2, which is exact in bf16."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 h, k, p, q;
        .reg .f32 a, b, c, d;
        mov.b32 h, 0x3f003f00;
        mov.b32 k, 0x80008000;
        fma.rn.bf16x2 h, $1, h, k;
        shl.b32 p, h, 16;
        and.b32 q, h, 0xffff0000;
        mov.b32 a, p;
        mov.b32 b, q;
        mul.f32 c, a, a;
        mul.f32 d, b, b;
        fma.rn.f32 c, c, 0f3E922279, 0f3FCC422A;
        fma.rn.f32 d, d, 0f3E922279, 0f3FCC422A;
        mul.f32 c, a, c;
        mul.f32 d, b, d;
        tanh.approx.f32 c, c;
        tanh.approx.f32 d, d;
        fma.rn.f32 a, a, c, a;
        fma.rn.f32 b, b, d, b;
        cvt.rn.bf16x2.f32 $0, b, a;
        }""",
        "=r,r", [v], dtype=v.dtype, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def activated(v, GELU: tl.constexpr, FAST: tl.constexpr, DOT: tl.constexpr):
    """Return v or its GELU, in DOT."""
    if GELU:
        v = _gelu_pairs(v) if FAST and v.dtype == tl.bfloat16 else _gelu(v.to(tl.float32), FAST)
    return v.to(DOT)


@triton.jit
def read_columns(
    p_x, x_row, m_m, o_d, D,
    GELU: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Read columns o_d of the rows that begin at x_row (int64 [BM]), in DOT; zeros outside."""
    mask = m_m[:, None]
    if not EVEN:
        mask = mask & (o_d < D)[None, :]
    v = tl.load(p_x + x_row[:, None] + o_d[None, :], mask=mask, other=0.0)
    return activated(v, GELU, FAST, DOT)


@triton.jit
def _times_basis(
    acc, squares, p_x, x_row, m_m, p_basis, first, last, D,
    GELU: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, EVEN: tl.constexpr, BK: tl.constexpr,
    DOT: tl.constexpr, FAST: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """Return acc [BM, RP] + columns ``first`` to ``last`` of x P, and squares [BM, 16] + x's.

    A product with ones adds squares up: a sum over columns would make the compiler compute x twice,
    once as the products read it and once as the sum does.
    """
    SQUARE: tl.constexpr = tl.float32 if tl.float32 == DOT else tl.bfloat16  # fp16 ends at 65504
    ones = tl.full((BK, 16), 1.0, dtype=SQUARE)
    o_k = tl.arange(0, BK)
    o_r = tl.arange(0, RP)
    w = p_basis + (first + o_k)[:, None] * R + o_r[None, :]  # [BK, RP]
    for k in range(first, last, BK):
        b_x = read_columns(p_x, x_row, m_m, k + o_k, D, GELU, EVEN, FAST, DOT)
        m_w = (o_r < R)[None, :]
        if not EVEN:
            m_w = m_w & (o_k + k < D)[:, None]
        b_w = tl.load(w, mask=m_w, other=0.0)
        acc = tl.dot(b_x, b_w.to(DOT), acc)
        if SQUARES:
            v = b_x.to(tl.float32)
            squares = tl.dot((v * v).to(SQUARE), ones, squares)
        w += BK * R
    return acc, squares


@triton.jit
def project(
    p_x, p_behind, p_basis, p_c, p_spread, p_amax, p_squares, M, T, D,
    image_x, stride_x, image_behind, stride_behind, split, blocks, n_main, part,
    R: tl.constexpr, RP: tl.constexpr, LEAD: tl.constexpr, LP: tl.constexpr, B: tl.constexpr,
    W: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
    CHAIN: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr, PARTS: tl.constexpr,
    SQUARES: tl.constexpr, AMAX: tl.constexpr,
):  # fmt: skip
    """Compute c = x P, [M, RP], and, in the last programs, the spread basis -P'' [tiles W, LP].

    Row t of image i begins at i * image_x + t * stride_x; ``blocks`` row blocks per image
    LEAD   first directions, which are projected out: P'' has them alone
    split  first column that lies behind (``concat``), a multiple of BK
    PARTS  the columns are cut into so many parts of ``part`` each, whose products go into a
           float32 [PARTS, M, RP] that ``gather`` or ``scale_rows`` adds up: few rows alone don't
           fill the chip
    SQUARES  and the sums of x's squares, float32 [PARTS, M]
    AMAX   amax = 0, unless ``gather`` follows
    """
    pid = tl.program_id(0)
    if CHAIN:
        gdc_launch_dependents()
        gdc_wait()
    o_r = tl.arange(0, RP)
    if pid < n_main * PARTS:
        index = pid // PARTS
        first = pid % PARTS * part
        last = tl.minimum(first + part, D)
        image = (index // blocks).to(tl.int64)
        o_t = (index % blocks) * BM + tl.arange(0, BM)
        m_m = o_t < T
        o_m = image * T + o_t
        x_row = image * image_x + o_t.to(tl.int64) * stride_x
        acc = tl.zeros((BM, RP), dtype=tl.float32)
        squares = tl.zeros((BM, 16), dtype=tl.float32)
        if KIND == "concat":
            middle = tl.minimum(tl.maximum(split, first), last)
            acc, squares = _times_basis(
                acc, squares, p_x, x_row, m_m, p_basis, first, middle, D,
                False, R, RP, EVEN, BK, DOT, FAST, SQUARES,
            )  # fmt: skip
            behind_row = image * image_behind + o_t.to(tl.int64) * stride_behind - split
            acc, squares = _times_basis(
                acc, squares, p_behind, behind_row, m_m, p_basis, middle, last, D,
                True, R, RP, EVEN, BK, DOT, FAST, SQUARES,
            )  # fmt: skip
        else:
            acc, squares = _times_basis(
                acc, squares, p_x, x_row, m_m, p_basis, first, last, D,
                KIND == "gelu", R, RP, EVEN, BK, DOT, FAST, SQUARES,
            )  # fmt: skip
        o_c = (pid % PARTS * M + o_m)[:, None] * RP + o_r[None, :]
        tl.store(p_c + o_c, acc.to(p_c.dtype.element_ty), mask=m_m[:, None])
        if SQUARES:
            tl.store(p_squares + pid % PARTS * M + o_m, tl.max(squares, 1), mask=m_m)
        if AMAX and PARTS == 1:
            tl.store(p_amax + o_m, tl.zeros((BM,), dtype=tl.int32), mask=m_m)
    else:
        o_d = (pid - n_main * PARTS) * W + tl.arange(0, W)
        o_l = tl.arange(0, LP)
        m_p = (o_d < D)[:, None] & (o_l < LEAD)[None, :]
        b_p = tl.load(p_basis + o_d[:, None] * R + o_l[None, :], mask=m_p, other=0.0)
        spread = -tl.dot(rotation(B, W, True).to(DOT), b_p.to(DOT))
        tl.store(p_spread + o_d[:, None] * LP + o_l[None, :], spread.to(p_spread.dtype.element_ty))


@triton.jit
def sum_of_parts(p_parts, M, row, m_m, RP: tl.constexpr, PARTS: tl.constexpr):
    """Add up rows (int64 [BM]) of c, float32 [BM, RP], of its PARTS, always in the same order."""
    acc = tl.zeros((row.shape[0], RP), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        o_p = (part * M + row)[:, None] * RP + tl.arange(0, RP)[None, :]
        acc += tl.load(p_parts + o_p, mask=m_m[:, None], other=0.0)
    return acc


@triton.jit
def gather(
    p_parts, p_c, p_amax, M,
    RP: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Add up c [M, RP] of its PARTS; amax = 0."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = o_m < M
    if CHAIN:
        gdc_launch_dependents()
        gdc_wait()
    row = o_m.to(tl.int64)
    o_c = row[:, None] * RP + tl.arange(0, RP)[None, :]
    acc = sum_of_parts(p_parts, M, row, m_m, RP, PARTS)
    tl.store(p_c + o_c, acc.to(p_c.dtype.element_ty), mask=m_m[:, None])
    tl.store(p_amax + o_m, tl.zeros((BM,), dtype=tl.int32), mask=m_m)
