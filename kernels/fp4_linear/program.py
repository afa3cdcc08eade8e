"""The kernel of ``fp4_linear``, and how it reads E2M1 and scales where the chip does not.

Letters: M rows, N outputs, K main-branch width, R low-rank directions, B bytes of two numbers each;
BM, BN, BK are tiles.
"""

import triton
import triton.language as tl

from ..w4a4_linear.program import finish, tile_at


@triton.jit
def _scales(byte, E4M3: tl.constexpr):
    """Decode bytes of scales, E4M3 or E8M0, to float32."""
    bits = byte.to(tl.int32)
    if E4M3:
        # Its exponent and mantissa under float32's bias; scales have no sign.
        scale = ((bits & 127) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        return tl.where((bits & 127) == 127, float("nan"), scale)
    scale = (bits << 23).to(tl.float32, bitcast=True)
    return tl.where(bits == 255, float("nan"), scale)


@triton.jit
def _values(packed, scale, DOT: tl.constexpr):
    """Decode bytes [R, B] of layout L2 times the float32 scales [R, G] of their groups: DOT
    [R, 2 B]. At most six significant bits: exact in bf16."""
    ROWS: tl.constexpr = packed.shape[0]
    COLUMNS: tl.constexpr = 2 * packed.shape[1]
    GROUPS: tl.constexpr = scale.shape[1]
    both = packed.to(tl.int32)
    bits = tl.join(both, both >> 4)
    # E2M1's exponent and mantissa under float32's bias.
    bits = ((bits & 7) << 22) | ((bits & 8) << 28)
    value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
    value = tl.reshape(value, (ROWS, GROUPS, COLUMNS // GROUPS)) * scale[:, :, None]
    return tl.reshape(value, (ROWS, COLUMNS)).to(DOT)


@triton.jit
def fp4_kernel(
    x_ptr, xscale_ptr, row_ptr, c_ptr, weight_ptr, wscale_ptr, wglobal_ptr, wp_ptr, bias_ptr, y_ptr,
    M, N, K,
    x_stride, xscale_stride, c_stride, weight_stride, wscale_stride, wp_stride, y_stride,
    R: tl.constexpr, G: tl.constexpr, E4M3: tl.constexpr, ROUNDED: tl.constexpr,
    SCALED: tl.constexpr, BIAS: tl.constexpr, DOT: tl.constexpr, LOWRANK: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """Compute y [BM, BN] of one tile as yᵀ.

    G        columns of a group
    E4M3     scales are E4M3, under a float32 per row of x and one for all weights; else E8M0
    ROUNDED  x is FP4, two columns a byte, and has scales; else 16 bits, without scales
    SCALED   ``tl.dot_scaled`` multiplies; else numbers are decoded here, to DOT
    LOWRANK  type of the low-rank branch's operands
    EVEN     K is a multiple of BK
    """
    m, n = tile_at(tl.program_id(0), M, N, BM, BN, GROUP_M)
    rows = m * BM + tl.arange(0, BM)
    cols = n * BN + tl.arange(0, BN)
    # Outputs past the end read the last one again, rows past the end nothing. Offsets: 64 bits.
    inside = (rows < M)[:, None]
    row = tl.minimum(rows, M - 1).to(tl.int64)
    col = tl.minimum(cols, N - 1).to(tl.int64)
    o_b, o_g = tl.arange(0, BK // 2), tl.arange(0, BK // G)
    o_x = o_b if ROUNDED else tl.arange(0, BK)
    STEP: tl.constexpr = BK // 2 if ROUNDED else BK
    x_at = x_ptr + (row * x_stride)[:, None] + o_x[None, :]
    weight_at = weight_ptr + (col * weight_stride)[:, None] + o_b[None, :]
    wscale_at = wscale_ptr + (col * wscale_stride)[:, None] + o_g[None, :]

    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for step in range(0, tl.cdiv(K, BK)):
        if EVEN:
            w = tl.load(weight_at + step * (BK // 2))  # [BN, BK / 2]
            s_w = tl.load(wscale_at + step * (BK // G))  # [BN, BK / G]
            x = tl.load(x_at + step * STEP, mask=inside, other=0)
        else:
            rest = K - step * BK
            w = tl.load(weight_at + step * (BK // 2), mask=(2 * o_b < rest)[None, :], other=0)
            m_g = (o_g * G < rest)[None, :]
            s_w = tl.load(wscale_at + step * (BK // G), mask=m_g, other=0)
            m_x = (o_x * (BK // STEP) < rest)[None, :]
            x = tl.load(x_at + step * STEP, mask=inside & m_x, other=0)
        if ROUNDED:
            s_x_at = xscale_ptr + (row * xscale_stride)[:, None] + (step * (BK // G) + o_g)[None, :]
            m_s = inside if EVEN else inside & (o_g * G < K - step * BK)[None, :]
            s_x = tl.load(s_x_at, mask=m_s, other=0)  # [BM, BK / G]
            if SCALED:
                if E4M3:
                    s_w = s_w.to(tl.float8e4nv, bitcast=True)
                    s_x = s_x.to(tl.float8e4nv, bitcast=True)
                acc = tl.dot_scaled(w, s_w, "e2m1", tl.trans(x), s_x, "e2m1", acc)
            else:
                x = _values(x, _scales(s_x, E4M3), DOT)
                acc = tl.dot(_values(w, _scales(s_w, E4M3), DOT), tl.trans(x), acc)
        else:
            acc = tl.dot(_values(w, _scales(s_w, E4M3), DOT), tl.trans(x.to(DOT)), acc)

    if E4M3:
        acc *= tl.load(wglobal_ptr)
        if ROUNDED:
            acc *= tl.load(row_ptr + row)[None, :]
    y = finish(
        acc, c_ptr, c_stride, wp_ptr, wp_stride, bias_ptr, row, col, R, BIAS, LOWRANK,
        WEIGHTS_LEFT=True,
    )  # fmt: skip
    y_at = y_ptr + (row * y_stride)[:, None] + cols[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=inside & (cols < N)[None, :])
