"""The kernels on unpacked weights: 8-bit codes in layout R1 on both sides.

Letters: M rows, N outputs, K main-branch width, R low-rank directions; BM, BN, BK are tiles.
"""

import triton
import triton.language as tl

from .program import finish, multiply, tile_at, weight_scale


@triton.jit
def unpacked_kernel(
    codes_ptr, scale_ptr, c_ptr, weight_ptr, wscale_ptr, wp_ptr, bias_ptr, y_ptr, M, N, COLUMNS,
    codes_stride, scale_stride, c_stride, weight_stride, wscale_stride, wp_stride, y_stride,
    R: tl.constexpr, ACT_GROUP: tl.constexpr, WEIGHT_GROUP: tl.constexpr, BIAS: tl.constexpr,
    FP8: tl.constexpr, LM4: tl.constexpr, DOT: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Compute y [BM, BN] of one tile; arguments as of ``packed_kernel``, weights are codes.

    COLUMNS  K, filled up to whole blocks of 64; EVEN: a multiple of BK
    """
    GROUPED: tl.constexpr = ACT_GROUP + WEIGHT_GROUP > 0
    SUM: tl.constexpr = tl.float32 if FP8 else tl.int32
    m, n = tile_at(tl.program_id(0), M, N, BM, BN, GROUP_M)
    rows = m * BM + tl.arange(0, BM)
    cols = n * BN + tl.arange(0, BN)
    # Rows past the end read the last one again: no mask in the loop. Offsets have 64 bits.
    row = tl.minimum(rows, M - 1).to(tl.int64)
    col = tl.minimum(cols, N - 1).to(tl.int64)
    column = tl.arange(0, BK)
    codes_at = codes_ptr + (row * codes_stride)[:, None] + column[None, :]
    weight_at = weight_ptr + (col * weight_stride)[:, None] + column[None, :]
    scale_at = scale_ptr + row * scale_stride
    wscale_at = wscale_ptr + col * wscale_stride

    acc = tl.zeros((BM, BN), dtype=tl.float32 if GROUPED else SUM)
    for k in range(0, COLUMNS, BK):
        if EVEN:
            codes, weight = tl.load(codes_at + k), tl.load(weight_at + k)  # [BM, BK], [BN, BK]
        else:
            inside = (k + column < COLUMNS)[None, :]
            codes = tl.load(codes_at + k, mask=inside, other=0.0)
            weight = tl.load(weight_at + k, mask=inside, other=0.0)
        if GROUPED:
            part = multiply(codes, weight, tl.zeros((BM, BN), dtype=SUM))
            s_x = tl.load(scale_at + (k // ACT_GROUP if ACT_GROUP else 0))
            s_w_at = wscale_at + (k // WEIGHT_GROUP if WEIGHT_GROUP else 0)
            acc += part.to(tl.float32) * (s_x[:, None] * weight_scale(s_w_at, FP8, LM4)[None, :])
        else:
            acc = multiply(codes, weight, acc)

    acc = acc.to(tl.float32)
    if not GROUPED:
        acc *= tl.load(scale_at)[:, None] * weight_scale(wscale_at, FP8, LM4)[None, :]
    y = finish(acc, c_ptr, c_stride, wp_ptr, wp_stride, bias_ptr, row, col, R, BIAS, DOT, False)
    y_at = y_ptr + (row * y_stride)[:, None] + cols[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])


@triton.jit
def tma_kernel(
    codes, scale_ptr, c_ptr, weight, wscale_ptr, wp_ptr, bias_ptr, y, M, N, COLUMNS,
    scale_stride, c_stride, wscale_stride, wp_stride,
    R: tl.constexpr, BIAS: tl.constexpr, FP8: tl.constexpr, LM4: tl.constexpr, DOT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Compute all of y by one program per multiprocessor: a tile's first loads overlap the last
    one's end. Descriptors read zeros past the end and don't write there. No group scales.

    codes, weight, y  descriptors of blocks [BM, BK], [BN, BK] and [BM, BN / 2]
    """
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m, n = tile_at(index, M, N, BM, BN, GROUP_M)
        acc = tl.zeros((BM, BN), dtype=tl.float32 if FP8 else tl.int32)
        for k in range(0, COLUMNS, BK):
            x, w = codes.load([m * BM, k]), weight.load([n * BN, k])
            acc = multiply(x, w, acc)
        row = tl.minimum(m * BM + tl.arange(0, BM), M - 1).to(tl.int64)
        col = tl.minimum(n * BN + tl.arange(0, BN), N - 1).to(tl.int64)
        s_x = tl.load(scale_ptr + row * scale_stride)
        s_w = weight_scale(wscale_ptr + col * wscale_stride, FP8, LM4)
        scaled = acc.to(tl.float32) * (s_x[:, None] * s_w[None, :])
        done = finish(
            scaled, c_ptr, c_stride, wp_ptr, wp_stride, bias_ptr, row, col, R, BIAS, DOT, False
        )
        # In two halves: half the shared memory, which the next tile's loads already fill.
        left, right = tl.split(tl.permute(tl.reshape(done, (BM, 2, BN // 2)), (0, 2, 1)))
        y.store([m * BM, n * BN], left.to(y.dtype))
        y.store([m * BM, n * BN + BN // 2], right.to(y.dtype))
