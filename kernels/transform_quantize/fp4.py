"""The pass of ``transform_quantize`` that rounds z to FP4, as matrix units read it (layout L2).

Bytes stand in the network's order: R1 order, in which z is, has the even and the odd columns of a
byte 32 apart, so that packing moves nothing. Letters as in passes.py; G channels share a scale.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from ..buffers import Fp4Codes
from ..build import Config
from ..chip import capability, chained
from ..formats.fp4 import LARGEST, SCALE_LARGEST, ZERO
from ..formats.spec import QuantSpec
from ..permuted import padded
from ..prologue import Prologue
from .kernel import rotated
from .scales import e4m3

ROWS, COLUMNS = 4, 512
"""Of a program of ``round_fp4``."""


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(v):
    return tl.reduce(tl.abs(v), 2, _nan_max)


@triton.jit
def _e4m3_byte(v):
    """Return the bits of float32 numbers >= 0 that are E4M3 numbers, or NaN."""
    bits = v.to(tl.int32, bitcast=True)
    byte = tl.where(v < 0.015625, (v * 512).to(tl.int32), (bits >> 20) - 960)
    return tl.where(v != v, 127, byte)


@triton.jit
def _nibble(halves):
    """Return E2M1 bits of numbers in halves: the nearest, ties to the even mantissa, saturating."""
    MAGIC: tl.constexpr = 8388608.0  # 2^23: adding it leaves no fraction bits
    size = tl.abs(halves)
    # Codes lie 1, 2 and 4 apart; counted by that, those from 4 and from 8 up start 2 and 4 later.
    part = tl.where(size >= 8, size * 0.25, tl.where(size >= 4, size * 0.5, size))
    start = tl.where(size >= 8, 4.0, tl.where(size >= 4, 2.0, 0.0))
    index = tl.minimum((part + MAGIC) - MAGIC + start, 7.0).to(tl.int32)
    return tl.where(halves < 0, index | 8, index)


@triton.jit
def round_fp4(
    p_z, p_amax, p_codes, p_scale, p_row, M, K, stride_z, stride_codes, stride_scale, n_col,
    G: tl.constexpr, E4M3: tl.constexpr, LARGEST: tl.constexpr, SPAN: tl.constexpr,
    ZERO: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Compute codes [M, K / 2] and scales [M, K / G], bytes, of z [M, K] in R1 order.

    E4M3  scales are E4M3 under a float32 per row, the row's largest |z| / SPAN (p_row); else E8M0
    """
    pid = tl.program_id(0)
    if CHAIN:
        gdc_wait()
    o_m = (pid // n_col) * BM + tl.arange(0, BM)
    m_m = o_m < M
    row = o_m.to(tl.int64)
    HALF: tl.constexpr = BW // 2
    byte = (pid % n_col) * HALF + tl.arange(0, HALF)
    m_b = m_m[:, None] & (2 * byte < K)[None, :]
    z = p_z + (row * stride_z)[:, None] + (byte // 32 * 64 + byte % 32)[None, :]
    even = tl.load(z, mask=m_b, other=0.0).to(tl.float32)
    odd = tl.load(z + 32, mask=m_b, other=0.0).to(tl.float32)
    even = tl.reshape(even, (BM, BW // G, G // 2))
    odd = tl.reshape(odd, (BM, BW // G, G // 2))
    amax = _nan_max(_largest(even), _largest(odd))  # [BM, BW / G]
    if E4M3:
        # Of z as it was stored: rounding keeps the order.
        top = tl.load(p_amax + o_m, mask=m_m, other=0).to(tl.float32, bitcast=True)
        top = top.to(p_z.dtype.element_ty).to(tl.float32)
        unit = tl.div_rn(top, tl.full((BM,), SPAN, tl.float32))
        unit = tl.where(unit == 0, 1.0, unit)
        if pid % n_col == 0:
            tl.store(p_row + o_m, unit, mask=m_m)
        share = tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32))
        share = tl.div_rn(share, tl.broadcast_to(unit[:, None], amax.shape))
        scale = e4m3(tl.where(share > 448, 448.0, share))  # NaN stays
        scale_byte = _e4m3_byte(scale)
        step = scale * 0.5 * unit[:, None]
    else:
        # A float's exponent is floor(log2) + 127; 4, E2M1's largest power of two, is left.
        exponent = amax.to(tl.int32, bitcast=True) >> 23
        scale_byte = tl.where(exponent == 255, 255, tl.maximum(exponent - 2, 0))
        step = ((scale_byte - 1) << 23).to(tl.float32, bitcast=True)  # half of 2^(byte - 127)
        step = tl.where((scale_byte == 0) | (scale_byte == 255), 0.0, step)
    some = step > ZERO
    inverse = tl.div_rn(tl.full(step.shape, 1.0, tl.float32), tl.where(some, step, 1.0))
    inverse = tl.where(some, inverse, 0.0)[:, :, None]
    codes = _nibble(even * inverse) | (_nibble(odd * inverse) << 4)
    at = p_codes + (row * stride_codes)[:, None] + byte[None, :]
    tl.store(at, tl.reshape(codes, (BM, HALF)).to(tl.uint8), mask=m_b)
    o_g = (pid % n_col) * (BW // G) + tl.arange(0, BW // G)
    at = p_scale + (row * stride_scale)[:, None] + o_g[None, :]
    tl.store(at, scale_byte.to(tl.uint8), mask=m_m[:, None] & (o_g * G < K)[None, :])


def launch(
    x: Prologue,
    p_DR: Tensor | None,
    t_DK: Tensor | None,
    spec: QuantSpec,
    *,
    beside: int = 0,
) -> Fp4Codes:
    """Compute FP4 codes, scales and c (``reference.transform_quantize``) of a prologue's rows.

    p_DR     bf16, [D, R], contiguous, or None at rank 0
    t_DK     bf16, [D, K]; ``transform="dense"`` only
    beside   last directions of P that stay in z
    returns  codes uint8 [M, K // 2], scale uint8 [M, K // G], c [M, R] in x's dtype or None, and
             the global scale of each row, float32 [M] (NVFP4)

    Fp4Codes are the reference's, but for ties that NVFP4's quotients miss by a rounding.
    """
    z, amax, c = rotated(x, p_DR, t_DK, spec, beside)
    m, k, group = len(z), spec.width, spec.act_group_size
    codes = z.new_empty((m, k // 2), dtype=torch.uint8)
    scale = z.new_empty((m, k // group), dtype=torch.uint8)
    row = z.new_empty((m,), dtype=torch.float32) if spec.activations.scale == "e4m3" else None
    n_col = triton.cdiv(padded(k), COLUMNS)
    config(spec, capability(z.device)).launch(
        (triton.cdiv(m, ROWS) * n_col,), z, amax, codes, scale, row, m, k, z.stride(0), k // 2,
        k // group, n_col,
    )  # fmt: skip
    return Fp4Codes(codes, scale, None if c is None else c[:, : spec.rank], row)


def config(spec: QuantSpec, chip: int | None) -> Config:
    """Configure ``round_fp4`` for the activations of ``spec``."""
    chain = chained(chip) and spec.transform.kind == "hadamard"  # not behind library products
    constants = {
        "G": spec.act_group_size, "E4M3": spec.activations.scale == "e4m3", "LARGEST": LARGEST,
        "SPAN": LARGEST * SCALE_LARGEST, "ZERO": ZERO, "BM": ROWS, "BW": COLUMNS, "CHAIN": chain,
    }  # fmt: skip
    return Config(kernel=round_fp4, constants=constants, early=chain)
