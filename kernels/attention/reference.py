"""Specification of 8-bit attention, and its CPU path: plain torch in float32.

    x = s_q s_k (q8 k8ᵀ)                   logits in powers of two
    P = e4m3(2^(8 + x - m)),  l = Σ 2^(8 + x - m)
    y = P v8 / l * s_v + mean(v)

q and k are INT8: smoothed, they are spread evenly enough that 127 equal steps lose less than the
three fraction bits of E4M3, and Hopper multiplies both at one rate. From k goes its mean over
tokens, which shifts all logits of a query alike and so leaves the softmax as it is (SageAttention,
arXiv 2410.02367); from v goes its mean too, which returns at the end because P's rows sum to one
(SageAttention2, arXiv 2411.10958). P and v are FP8-E4M3: P's largest value in a row is 1 and its
small ones count, which takes an exponent.

Letters: B batch, T queries, S keys, H heads, d channels of a head, N blocks of K_BLOCK keys.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..full_float32 import full_float32

K_BLOCK = 128
"""Keys that share a scale."""

INT8_MAX, E4M3_MAX = 127.0, 448.0

P_BITS = 8.0
"""P stands as e4m3(2^8 P): a power of two, with room below 448 for rounding."""

TINY = 1e-30
"""Rows, blocks and channels no larger than this are zero: 127 / amax would overflow."""


@dataclass(frozen=True, slots=True)
class Codes:
    """q, k and v in 8 bits."""

    q_BHTd: Tensor
    """int8; times ``q_scale_BHT`` it is q scale log2(e)."""
    q_scale_BHT: Tensor
    """float32"""
    k_BHSd: Tensor
    """int8; times ``k_scale_BHN`` of its block it is k - mean(k)."""
    k_scale_BHN: Tensor
    """float32"""
    v_BHSd: Tensor
    """float8_e4m3fn; times ``v_scale_BHd`` it is v - mean(v)."""
    v_scale_BHd: Tensor
    """float32"""
    v_mean_BHd: Tensor
    """float32"""


def attention(q_BTHd: Tensor, k_BSHd: Tensor, v_BSHd: Tensor, *, scale: float) -> Tensor:
    """Compute 8-bit attention, [B, T, H, d] in q's dtype (:func:`.engines.run`)."""
    y_BHTd = attend(quantize(q_BTHd, k_BSHd, v_BSHd, scale=scale))
    return y_BHTd.transpose(1, 2).to(q_BTHd.dtype, memory_format=torch.contiguous_format)


def quantize(q_BTHd: Tensor, k_BSHd: Tensor, v_BSHd: Tensor, *, scale: float) -> Codes:
    """Round q (a scale per row), k (per block of K_BLOCK rows) and v (per channel).

    q_BTHd  floating, [B, T, H, d]
    k_BSHd  floating, [B, S, H, d]
    v_BSHd  floating, [B, S, H, d]
    scale   factor of the logits
    """
    q, k, v = (t.transpose(1, 2).float() for t in (q_BTHd, k_BSHd, v_BSHd))
    k = k - k.mean(2, keepdim=True)
    v_mean = v.mean(2, keepdim=True)
    v = v - v_mean
    q_amax = q.abs().amax(3)
    rows = k.abs().amax(3)
    blocks = torch.nn.functional.pad(rows, (0, -rows.shape[2] % K_BLOCK))
    k_amax = blocks.unflatten(2, (-1, K_BLOCK)).amax(3)
    v_amax = v.abs().amax(2)
    per_row = k_amax.repeat_interleave(K_BLOCK, 2)[:, :, : k.shape[2]]
    return Codes(
        (q * _steps(q_amax, INT8_MAX)[..., None]).round().to(torch.int8),
        q_amax / INT8_MAX * (scale * math.log2(math.e)),
        (k * _steps(per_row, INT8_MAX)[..., None]).round().to(torch.int8),
        k_amax / INT8_MAX,
        (v * _steps(v_amax, E4M3_MAX)[:, :, None]).to(torch.float8_e4m3fn),
        v_amax / E4M3_MAX,
        v_mean.squeeze(2),
    )


def attend(codes: Codes, *, block: int = K_BLOCK) -> Tensor:
    """Compute y of codes, float32 [B, H, T, d].

    block  keys per step; K_BLOCK is a multiple of it. P is rounded against the largest logit so
           far, and what came before is scaled again whenever that grows
    """
    q, k, v = codes.q_BHTd.float(), codes.k_BHSd.float(), codes.v_BHSd.float()
    y = torch.zeros_like(q)
    total = torch.zeros_like(codes.q_scale_BHT)
    peak = torch.full_like(total, -math.inf)
    with full_float32():
        for start in range(0, k.shape[2], block):
            keys = slice(start, start + block)
            unit = codes.q_scale_BHT * codes.k_scale_BHN[:, :, start // K_BLOCK, None]
            x = (q @ k[:, :, keys].mT) * unit[..., None]
            higher = torch.maximum(peak, x.amax(3))
            p = torch.exp2(x - higher[..., None] + P_BITS)
            fade = torch.exp2(peak - higher)
            total = total * fade + p.sum(3)
            y = y * fade[..., None] + p.to(torch.float8_e4m3fn).float() @ v[:, :, keys]
            peak = higher
    y = y / total[..., None]
    return y * codes.v_scale_BHd[:, :, None] + codes.v_mean_BHd[:, :, None]


def _steps(amax: Tensor, largest: float) -> Tensor:
    """Return codes per unit; 0 where all is zero, NaN where a NaN must show."""
    some = ~(amax <= TINY)
    return torch.where(some, largest / torch.where(some, amax, 1.0), 0.0)
