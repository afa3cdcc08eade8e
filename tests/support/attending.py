"""Attention as tests ask for it."""

from typing import Any

from torch import Tensor

from dirotq.kernels.attention import run


def attention(
    q_BTHd: Tensor,
    k_BSHd: Tensor,
    v_BSHd: Tensor,
    *,
    mode: str = "exact",
    mask: Any = None,
    scale: float | None = None,
) -> Tensor:
    return run(q_BTHd, k_BSHd, v_BSHd, mask, scale, mode)
