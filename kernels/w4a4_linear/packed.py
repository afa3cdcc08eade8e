"""The packed kernel: weights stay nibbles in memory and are decoded in registers, step by step.

Codes stand in layout R1 (``kernels/permuted.py``): in every 64 columns the low nibbles of a weight
row's 32 bytes meet the first 32 codes, the high nibbles the last 32.

Letters: M rows, N outputs, K main-branch width, R low-rank directions; BM, BN, BK are tiles.
"""

import triton
import triton.language as tl

from ..lm4_lookup import lm4_bytes
from .program import finish, multiply, tile_at, weight_scale


@triton.jit
def _int4_bytes(words, FP8: tl.constexpr):
    """Decode INT4 in the low nibbles of uint32 words' bytes, four bytes."""
    negative = (words >> 3) & 0x01010101
    if FP8:
        # Two's complement to magnitude, -8 too: flip the bits and add one. The sign is bit 7.
        return ((words & 0x0F0F0F0F) ^ (negative * 15)) + negative * 129
    return (words & 0x0F0F0F0F) | (negative * 240)


@triton.jit
def _codes(four, FP8: tl.constexpr):
    """Take words of four bytes apart: [N, W] -> [N, 4 W], int8 or FP8."""
    even = tl.join(four.to(tl.uint8), (four >> 16).to(tl.uint8))
    odd = tl.join((four >> 8).to(tl.uint8), (four >> 24).to(tl.uint8))
    codes = tl.reshape(tl.join(even, odd), (four.shape[0], 4 * four.shape[1]))
    return codes.to(tl.float8e4nv if FP8 else tl.int8, bitcast=True)


@triton.jit
def decode(words, FP8: tl.constexpr, LM4: tl.constexpr):
    """Decode the low nibbles of uint32 words' bytes, and the high ones: [N, W] -> two of [N, 4 W].

    Four codes at a time, so that few instructions stand between memory and the tensor cores. FP8
    codes are times 2^-9: a subnormal E4M3's bits are its sign and its magnitude.
    """
    if LM4:
        low, high = lm4_bytes(words, FP8)
        return _codes(low, FP8), _codes(high, FP8)
    return _codes(_int4_bytes(words, FP8), FP8), _codes(_int4_bytes(words >> 4, FP8), FP8)


@triton.jit
def packed_kernel(
    codes_ptr, scale_ptr, c_ptr, weight_ptr, wscale_ptr, wp_ptr, bias_ptr, y_ptr, M, N, BYTES,
    codes_stride, scale_stride, c_stride, weight_stride, wscale_stride, wp_stride, y_stride,
    R: tl.constexpr, ACT_GROUP: tl.constexpr, WEIGHT_GROUP: tl.constexpr, BIAS: tl.constexpr,
    FP8: tl.constexpr, LM4: tl.constexpr, DOT: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Compute y [BM, BN] of one tile as yᵀ: only a left operand may come from registers.

    BYTES          K / 2, a multiple of 4
    weight_stride  in words of 4 bytes
    ACT_GROUP      columns per scale, as WEIGHT_GROUP; 0: one scale per row
    DOT            type of the low-rank branch's operands
    EVEN           K is a multiple of BK
    """
    GROUPED: tl.constexpr = ACT_GROUP + WEIGHT_GROUP > 0
    SUM: tl.constexpr = tl.float32 if FP8 else tl.int32
    m, n = tile_at(tl.program_id(0), M, N, BM, BN, GROUP_M)
    rows = m * BM + tl.arange(0, BM)
    cols = n * BN + tl.arange(0, BN)
    # Outputs past the end read the last one again; rows past the end, which few rows have many of,
    # read nothing: a hundred programs reading one line over and over would wait for it. Offsets
    # have 64 bits.
    inside = (rows < M)[:, None]
    row = tl.minimum(rows, M - 1).to(tl.int64)
    col = tl.minimum(cols, N - 1).to(tl.int64)
    byte, word = tl.arange(0, BK // 2), tl.arange(0, BK // 8)
    column = byte // 32 * 64 + byte % 32  # of the code that meets a byte's low nibble
    codes_at = codes_ptr + (row * codes_stride)[:, None] + column[None, :]
    weight_at = weight_ptr + (col * weight_stride)[:, None] + word[None, :]  # uint32
    scale_at = scale_ptr + row * scale_stride
    wscale_at = wscale_ptr + col * wscale_stride

    acc = tl.zeros((BN, BM), dtype=tl.float32 if GROUPED else SUM)
    for start in range(0, BYTES, BK // 2):
        if EVEN:
            words = tl.load(weight_at + start // 4)  # [BN, BK / 8]
            low = tl.load(codes_at + 2 * start, mask=inside, other=0.0)  # [BM, BK / 2]
            high = tl.load(codes_at + (2 * start + 32), mask=inside, other=0.0)
        else:
            more_words = (start // 4 + word < BYTES // 4)[None, :]
            more = inside & (start + byte < BYTES)[None, :]
            words = tl.load(weight_at + start // 4, mask=more_words, other=0)
            low = tl.load(codes_at + 2 * start, mask=more, other=0.0)
            high = tl.load(codes_at + (2 * start + 32), mask=more, other=0.0)
        low_w, high_w = decode(words, FP8, LM4)  # [BN, BK / 2]
        if GROUPED:
            part = multiply(low_w, low, tl.zeros((BN, BM), dtype=SUM))
            part = multiply(high_w, high, part)
            s_x = tl.load(scale_at + (2 * start // ACT_GROUP if ACT_GROUP else 0))
            s_w_at = wscale_at + (2 * start // WEIGHT_GROUP if WEIGHT_GROUP else 0)
            acc += part.to(tl.float32) * (weight_scale(s_w_at, FP8, LM4)[:, None] * s_x[None, :])
        else:
            acc = multiply(low_w, low, acc)
            acc = multiply(high_w, high, acc)

    acc = acc.to(tl.float32)
    if not GROUPED:
        acc *= weight_scale(wscale_at, FP8, LM4)[:, None] * tl.load(scale_at)[None, :]
    y = finish(
        acc, c_ptr, c_stride, wp_ptr, wp_stride, bias_ptr, row, col, R, BIAS, DOT, WEIGHTS_LEFT=True
    )
    y_at = y_ptr + (row * y_stride)[:, None] + cols[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])
