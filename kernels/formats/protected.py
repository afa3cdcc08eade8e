"""Specification of the 8-bit low-rank branch (docs/method.md M3).

Letters: M rows, N outputs, R protected directions.
"""

import torch
from torch import Tensor

QMAX = 127


def quantize_protected(wp_NR: Tensor) -> tuple[Tensor, Tensor]:
    """Round the protected weights to symmetric 8-bit codes, one scale per output.

    wp_NR    float, [N, R]
    returns  codes int8 [N, R] in [-127, 127], and scales bf16 [N, 1], rounded before the codes
    """
    scale_N1 = (wp_NR.abs().amax(1, keepdim=True) / QMAX).to(torch.bfloat16)
    step = scale_N1.to(wp_NR.dtype)
    q = torch.where(step > 0, wp_NR / step, 0.0).round().clamp(-QMAX, QMAX)
    return q.to(torch.int8), scale_N1


def dequantize_protected(codes_NR: Tensor, scale_N1: Tensor) -> Tensor:
    """Multiply codes by scales: float32 [N, R]."""
    return codes_NR.float() * scale_N1.float()


def rounded_coefficients(c_MR: Tensor) -> Tensor:
    """Round c to the 8-bit grid of its row: float [M, R] -> float32 [M, R]."""
    c_MR = c_MR.float()
    step = c_MR.abs().amax(-1, keepdim=True) / QMAX
    return torch.where(step > 0, c_MR / step, 0.0).round() * step
