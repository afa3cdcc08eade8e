"""A block's output joins the residual stream: x + gate * y, and the next block's norm reads it."""

from dataclasses import replace

import torch
from torch import Tensor

from ..chip import capability, why_reference
from ..prologue import Prologue, modulated_norm
from . import reference

__all__ = ["gated_residual", "gated_residual_norm"]


def gated_residual(x_BTD: Tensor, gate_BD: Tensor, y_BTD: Tensor) -> Tensor:
    """Compute x + gate * y, [B, T, D] in x's dtype (:mod:`.reference`).

    An NVIDIA GPU takes bf16 and fp16 in one pass, rounded once.
    """
    if _fast(x_BTD):
        from .kernel import launch

        return launch(x_BTD, gate_BD, y_BTD)
    return reference.gated_residual(x_BTD, gate_BD, y_BTD)


def gated_residual_norm(
    x_BTD: Tensor, gate_BD: Tensor, y_BTD: Tensor, scale_BD: Tensor, shift_BD: Tensor, *, eps: float
) -> tuple[Tensor, Prologue]:
    """Compute x + gate * y, and its LayerNorm with modulation (:func:`..prologue.modulated_norm`).

    An NVIDIA GPU computes both in one pass; elsewhere the norm waits for who reads the prologue.
    """
    if _fast(x_BTD):
        from .kernel import launch_with_norm

        x, *known = launch_with_norm(x_BTD, gate_BD, y_BTD, scale_BD, shift_BD, eps=eps)
        prologue = modulated_norm(x, scale_BD, shift_BD, eps=eps)
        return x, replace(prologue, known=(known[0], known[1]))
    x = reference.gated_residual(x_BTD, gate_BD, y_BTD)
    return x, modulated_norm(x, scale_BD, shift_BD, eps=eps)


def _fast(x: Tensor) -> bool:
    halves = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    return halves and not torch.compiler.is_compiling() and not why_reference(capability(x.device))
