"""Specification of ``gated_residual``. Letters: B images, T tokens, D channels."""

from torch import Tensor


def gated_residual(x_BTD: Tensor, gate_BD: Tensor, y_BTD: Tensor) -> Tensor:
    """Compute x + gate * y in x's dtype.

    x_BTD    floating, [B, T, D]
    gate_BD  [B, D], a factor per image and channel
    y_BTD    [B, T, D]
    """
    return x_BTD + gate_BD[:, None] * y_BTD
