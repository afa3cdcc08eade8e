"""RMSNorm and rotary embedding of q and k in one pass, joined tokens of text and image."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..chip import capability, say_once, why_reference
from . import reference
from .reference import Part, Rope, check

__all__ = ["Part", "Rope", "qk_norm_rope"]

WIDEST = 256
"""Channels of the widest head that the kernel takes."""


def qk_norm_rope(
    parts: Sequence[Part], rope: Rope | None, *, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q and k normed and turned, and v, [B, T, H, D] each (:func:`.reference.qk_norm_rope`).

    On an NVIDIA GPU a Triton kernel takes bf16 and fp16 and rounds once, at the end; it has no
    gradients. Other devices and dtypes, and ``torch.compile``, which fuses plain torch by itself,
    take the reference.

    Raises ValueError for parts that don't go together.
    """
    first = parts[0].qkv_BTC if parts else None
    if first is not None and first.is_cuda and not torch.compiler.is_compiling():
        reason = why_not(first, check(parts, rope, heads))
        if reason is None:
            from .kernel import launch

            return launch(parts, rope, heads=heads, eps=eps)
        say_once(f"q and k are normed by plain torch: {reason}", logging.WARNING)
    return reference.qk_norm_rope(parts, rope, heads=heads, eps=eps)


def why_not(x: Tensor, dim: int) -> str | None:
    """Return why the kernel can't take heads of ``dim`` channels of x; None if it can."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"{str(x.dtype).removeprefix('torch.')} is computed as specified"
    if dim % 8 or dim > WIDEST:
        return f"heads of {dim} channels; the kernel takes multiples of 8 up to {WIDEST}"
    return why_reference(capability(x.device))
