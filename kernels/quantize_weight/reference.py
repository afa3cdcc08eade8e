"""Specification of the weight grid (docs/method.md M4).

Letters: N outputs, K main-branch inputs, G groups per row, R protected directions.
"""

import itertools

import torch
from torch import Tensor

from ..tail import BIAS_LIMIT, LIMIT
from ..transform_quantize.reference import TINY

QMAX = 7
"""Largest code: symmetric 4-bit codes lie in [-7, 7]."""

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)

CHUNK = 1 << 25
"""Weights that are searched at a time: the search holds about six tensors of their size."""


def codes_on_grid(w_NK: Tensor, scale_NG: Tensor) -> Tensor:
    """Nearest codes on a given grid: float [N, K], bf16 scales [N, G] -> int8 [N, K]."""
    w_NGk = w_NK.unflatten(-1, (scale_NG.shape[-1], -1))
    s_NG1 = scale_NG.to(w_NK.dtype).unsqueeze(-1)
    # An all-zero group has scale 0: its codes are 0, not 0/0.
    q = torch.where(s_NG1 > 0, w_NGk / s_NG1, 0.0).round_().clamp_(-QMAX, QMAX)
    return q.flatten(-2).to(torch.int8)


def dequantize_weight(q_NK: Tensor, scale_NG: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes int8 [N, K] times bf16 scales [N, G], in ``dtype``."""
    q_NGk = q_NK.to(dtype).unflatten(-1, (scale_NG.shape[-1], -1))
    return (q_NGk * scale_NG.to(dtype).unsqueeze(-1)).flatten(-2)


def scale_floor(wp_NR: Tensor | None, bias_N: Tensor | None) -> Tensor | None:
    """Least channel scale with which an output's FP8 tail holds its protected weights and bias.

    wp_NR    W P, bf16 as stored, [N, R], or None at rank 0
    bias_N   bf16 as stored, [N], or None
    returns  bf16, [N, 1]: max(|wp| / LIMIT, |bias| / BIAS_LIMIT), rounded up, and TINY or more
             unless both are zero (docs/method.md Eq. 9); None without wp and bias
    """
    needs = []
    if wp_NR is not None and wp_NR.shape[1]:
        needs.append(wp_NR.float().abs().amax(1, keepdim=True) / LIMIT)
    if bias_N is not None:
        needs.append(bias_N.float().abs()[:, None] / BIAS_LIMIT)
    if not needs:
        return None
    floor_N1 = torch.stack(needs).amax(0)
    # Denormal scales have no reciprocal.
    floor_N1 = torch.where(floor_N1 > 0, floor_N1.clamp_min(TINY), 0.0)
    # bf16 is the upper half of a float32. Carrying into it whatever the lower half holds rounds a
    # positive number up; rounding to nearest could fall below what the tail needs.
    bits_N1 = floor_N1.view(torch.int32) + 0xFFFF
    return (bits_N1 & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


def weight_scales(
    w_NK: Tensor,
    groups: int,
    *,
    clip: bool,
    importance_K: Tensor | None = None,
    floor_N1: Tensor | None = None,
) -> Tensor:
    """One scale per row and group: amax/7, or the clipped amax with the least weighted error.

    w_NK          float, [N, K], K a multiple of ``groups``
    importance_K  float >= 0, [K]: weight of a column's squared error (the diagonal of the second
                  moment); None counts all columns alike
    floor_N1      bf16, [N, 1]: no scale of a row is less (:func:`scale_floor`); None: no floor
    returns       bf16, [N, groups]: rounded here, once, so that codes are chosen on the stored grid
    """
    columns_K = torch.ones_like(w_NK[0]) if importance_K is None else importance_K.to(w_NK.dtype)
    rows = max(CHUNK // w_NK.shape[1], 1)
    floors = itertools.repeat(None) if floor_N1 is None else floor_N1.split(rows)
    parts = zip(w_NK.split(rows), floors)  # rows do not see each other
    return torch.cat([_scales(w, groups, clip, columns_K, floor) for w, floor in parts])


def _scales(
    w_NK: Tensor, groups: int, clip: bool, columns_K: Tensor, floor_N1: Tensor | None
) -> Tensor:
    """:func:`weight_scales` of some rows; a column's squared error counts ``columns_K`` times."""
    amax_NG = w_NK.unflatten(-1, (groups, -1)).abs().amax(-1)
    best = _at_least(floor_N1, (amax_NG / QMAX).to(torch.bfloat16))
    if not clip:
        return best
    h_Gk = columns_K.unflatten(-1, (groups, -1))
    best_error = torch.full_like(amax_NG, torch.inf)
    for fraction in CLIPS:
        # Raised before they are compared: the search sees only grids that may be stored.
        scale = _at_least(floor_N1, (amax_NG * (fraction / QMAX)).to(torch.bfloat16))
        error_NK = dequantize_weight(codes_on_grid(w_NK, scale), scale, w_NK.dtype) - w_NK
        error = (error_NK.unflatten(-1, (groups, -1)).square() * h_Gk).sum(-1)
        better = error < best_error
        best = torch.where(better, scale, best)
        best_error = torch.where(better, error, best_error)
    return best


def _at_least(floor_N1: Tensor | None, scale_NG: Tensor) -> Tensor:
    return scale_NG if floor_N1 is None else torch.maximum(scale_NG, floor_N1)
