"""Specification of the weight grid (docs/method.md M4).

Letters: N outputs, K main-branch inputs, G groups per row.
"""

import torch
from torch import Tensor

QMAX = 7
"""Largest code: symmetric 4-bit codes lie in [-7, 7]."""

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


def codes_on_grid(w_NK: Tensor, scale_NG: Tensor) -> Tensor:
    """Nearest codes on a given grid: float [N, K], bf16 scales [N, G] -> int8 [N, K]."""
    w_NGk = w_NK.unflatten(-1, (scale_NG.shape[-1], -1))
    s_NG1 = scale_NG.to(w_NK.dtype).unsqueeze(-1)
    # An all-zero group has scale 0: its codes are 0, not 0/0.
    q = torch.where(s_NG1 > 0, w_NGk / s_NG1, 0.0).round().clamp(-QMAX, QMAX)
    return q.flatten(-2).to(torch.int8)


def dequantize_weight(q_NK: Tensor, scale_NG: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes int8 [N, K] times bf16 scales [N, G], in ``dtype``."""
    q_NGk = q_NK.to(dtype).unflatten(-1, (scale_NG.shape[-1], -1))
    return (q_NGk * scale_NG.to(dtype).unsqueeze(-1)).flatten(-2)


def weight_scales(
    w_NK: Tensor, groups: int, *, clip: bool, importance_K: Tensor | None = None
) -> Tensor:
    """One scale per row and group: amax/7, or the clipped amax with the least weighted error.

    w_NK          float, [N, K], K a multiple of ``groups``
    importance_K  float >= 0, [K]: weight of a column's squared error (the diagonal of the second
                  moment); None counts all columns alike
    returns       bf16, [N, groups]: rounded here, once, so that codes are chosen on the stored grid
    """
    w_NGk = w_NK.unflatten(-1, (groups, -1))
    amax_NG = w_NGk.abs().amax(-1)
    best = (amax_NG / QMAX).to(torch.bfloat16)
    if not clip:
        return best
    columns = torch.ones_like(w_NK[0]) if importance_K is None else importance_K.to(w_NK.dtype)
    h_Gk = columns.unflatten(-1, (groups, -1))
    best_error = torch.full_like(amax_NG, torch.inf)
    for fraction in CLIPS:
        scale = (amax_NG * (fraction / QMAX)).to(torch.bfloat16)
        error_NK = dequantize_weight(codes_on_grid(w_NK, scale), scale, w_NK.dtype) - w_NK
        error = (error_NK.unflatten(-1, (groups, -1)).square() * h_Gk).sum(-1)
        better = error < best_error
        best = torch.where(better, scale, best)
        best_error = torch.where(better, error, best_error)
    return best
