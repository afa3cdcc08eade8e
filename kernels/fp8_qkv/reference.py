"""Specification of q, k and v in FP8-E4M3 with one scale per head, and of attention on them.

    q8 = e4m3(q H / s_q)            s_q = √b max |q| / 448
    k8 = e4m3((k - m) H / s_k)      s_k = √b (max |k| + max |m|) / 448,  m = mean of k over tokens
    v8 = e4m3(v / s_v)              s_v = max |v| / 448

H is the orthonormal block Hadamard matrix of the largest block, b, that divides a head. On both
sides of q kᵀ it changes nothing, and it spreads what single channels of q and k hold: a rounding
error is a part of its own number, so a product that one channel makes alone is wrong by that part.
m shifts all logits of a query alike, which the softmax does not see (SageAttention, arXiv
2410.02367).

√b times the largest single number bounds every number of a rotated vector, so nothing is clipped,
and rotating is left to the pass that rounds. The bound lies some ten times too high: E4M3 has its
three fraction bits over fifteen powers of two, so that costs nothing.

Attention rounds P as FlashAttention-3 does (arXiv 2407.08608): e4m3(2^8 P), P's largest being 1.

Letters: B batch, T queries, S keys, H heads, d channels of a head.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.hadamard import block_hadamard, hadamard_block
from ..full_float32 import full_float32

E4M3_MAX = 448.0
P_BITS = 8.0
TINY = 1e-12
"""Heads no larger than this have codes of zero and a scale of one. Scales of zero, or whose product
is, would make NaN of the infinities by which FlashAttention-3 masks its last block of keys."""


@dataclass(frozen=True, slots=True)
class Codes:
    """q, k and v: codes times scales."""

    q_BTHd: Tensor
    """float8_e4m3fn, contiguous, as k and v; of q H."""
    k_BSHd: Tensor
    """Of (k - m) H."""
    v_BSHd: Tensor
    q_scale_BH: Tensor
    """float32, as the others' scales."""
    k_scale_BH: Tensor
    v_scale_BH: Tensor


def attention(q_BTHd: Tensor, k_BSHd: Tensor, v_BSHd: Tensor, *, scale: float) -> Tensor:
    """Compute attention in FP8, [B, T, H, d] in q's dtype.

    q_BTHd  floating, [B, T, H, d]
    k_BSHd  the same dtype, [B, S, H, d]; v_BSHd likewise
    scale   factor of the logits
    """
    y_BTHd = attend(quantize(q_BTHd, k_BSHd, v_BSHd), scale=scale)
    return y_BTHd.to(q_BTHd.dtype)


def quantize(q_BTHd: Tensor, k_BSHd: Tensor, v_BSHd: Tensor) -> Codes:
    """Round q, k and v, of any floating dtype."""
    q, k, v = (t.float() for t in (q_BTHd, k_BSHd, v_BSHd))
    block = hadamard_block(q.shape[-1], q.shape[-1])
    mean = k.mean(1, keepdim=True)
    q_bound, k_bound, v_bound = (t.abs().amax((1, 3)) for t in (q, k, v))
    k_bound = k_bound + mean.abs().amax((1, 3))
    q_bound, k_bound = block**0.5 * q_bound, block**0.5 * k_bound
    with full_float32():
        q, k = block_hadamard(q, block), block_hadamard(k, block) - block_hadamard(mean, block)
    scales = [
        torch.where(bound <= TINY, 1.0, bound / E4M3_MAX) for bound in (q_bound, k_bound, v_bound)
    ]
    codes = [_rounded(*pair) for pair in zip((q, k, v), (q_bound, k_bound, v_bound))]
    return Codes(*codes, *scales)


def values(v_BSHd: Tensor) -> tuple[Tensor, Tensor]:
    """Return v's codes and scales alone."""
    codes = quantize(v_BSHd, v_BSHd, v_BSHd)
    return codes.v_BSHd, codes.v_scale_BH


def attend(codes: Codes, *, scale: float) -> Tensor:
    """Compute y of codes, float32 [B, T, H, d]."""
    q, k, v = (t.transpose(1, 2).float() for t in (codes.q_BTHd, codes.k_BSHd, codes.v_BSHd))
    unit_BH = codes.q_scale_BH * codes.k_scale_BH * (scale * math.log2(math.e))
    with full_float32():
        x = (q @ k.mT) * unit_BH[..., None, None]
        p = torch.exp2(x - x.amax(3, keepdim=True) + P_BITS)
        y = p.to(torch.float8_e4m3fn).float() @ v / p.sum(3, keepdim=True)
    return (y * codes.v_scale_BH[..., None, None]).transpose(1, 2).contiguous()


def _rounded(x_BTHd: Tensor, bound_BH: Tensor) -> Tensor:
    """Round to codes; 0 where all is zero, NaN where a NaN must show."""
    some = ~(bound_BH <= TINY)
    steps_BH = torch.where(some, E4M3_MAX / torch.where(some, bound_BH, 1.0), 0.0)
    codes = x_BTHd * steps_BH[:, None, :, None]
    return codes.to(torch.float8_e4m3fn)
