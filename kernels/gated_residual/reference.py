"""Specification of ``gated_residual``. Letters: B images, T tokens, D channels."""

import torch
from torch import Tensor

LARGEST = 65504
"""fp16 values end here; networks trained in wider types may pass it, and go on from it."""


def gated_residual(x_BTD: Tensor, gate_BD: Tensor, y_BTD: Tensor) -> Tensor:
    """x + gate * y in x's dtype; fp16 is cut off at its largest number, as diffusers does.

    x_BTD    floating, [B, T, D]
    gate_BD  [B, D], a factor per image and channel
    y_BTD    [B, T, D]
    """
    out = x_BTD + gate_BD[:, None] * y_BTD
    return out.clip(-LARGEST, LARGEST) if out.dtype == torch.float16 else out
