"""``torch.ops.dirotq.norm_rope``: RMSNorm and rotary embedding of queries or keys, in one pass.

One operator, so that ``torch.compile`` can call it where it finds the two in a block's graph.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..chip import capability, say_once, why_reference
from . import reference

__all__ = ["codes", "why_not", "why_not_codes"]

WIDEST = 8192
"""Channels of the widest head that the kernel takes."""

library = torch.library.Library("dirotq", "FRAGMENT")
library.define(
    "norm_rope(Tensor[] parts, Tensor?[] weights, float? eps, Tensor?[] cos, Tensor?[] sin, "
    "bool interleaved) -> Tensor"
)


def norm_rope(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    eps: float | None,
    cos: Sequence[Tensor | None],
    sin: Sequence[Tensor | None],
    interleaved: bool,
) -> Tensor:
    """Return :func:`.reference.norm_rope` of its arguments, [B, T, H, D], contiguous.

    On an NVIDIA GPU a Triton kernel takes bf16 and fp16 and rounds once, at the end. Other devices
    and dtypes take the reference. There are no gradients.

    Raises ValueError for parts that don't go together.
    """
    reference.check(parts, weights, eps, cos, sin)
    if not parts[0].is_cuda:
        return reference.norm_rope(parts, weights, eps, cos, sin, interleaved)
    if reason := why_not(parts[0].dtype, parts[0].device, parts[0].shape[-1]):
        say_once(f"q or k is normed and turned by plain torch: {reason}", logging.WARNING)
        return reference.norm_rope(parts, weights, eps, cos, sin, interleaved)
    from .kernel import launch

    return launch(parts, weights, eps, cos, sin, interleaved)


def _fake(parts: Sequence[Tensor], *rest: object, **named: object) -> Tensor:
    batch, _, heads, dim = parts[0].shape
    tokens = sum(part.shape[1] for part in parts)
    return parts[0].new_empty((batch, tokens, heads, dim))


library.impl("norm_rope", norm_rope, "CompositeExplicitAutograd")
torch.library.register_fake("dirotq::norm_rope", _fake, lib=library)


def why_not(dtype: torch.dtype, device: torch.device, dim: int) -> str | None:
    """Return why the kernel can't take heads of ``dim`` channels; None if it can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{str(dtype).removeprefix('torch.')} is computed as specified"
    if dim % 8 or dim > WIDEST:
        return f"heads of {dim} channels; the kernel takes multiples of 8 up to {WIDEST}"
    return why_reference(capability(device))


def codes(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    eps: float,
    cos: Sequence[Tensor | None],
    sin: Sequence[Tensor | None],
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Return :func:`.reference.codes` of what :func:`why_not_codes` allows: codes, [B, T, H, D] in
    FP8, and scales, [B, H]."""
    if not parts[0].is_cuda:
        return reference.codes(parts, weights, eps, cos, sin, interleaved)
    from .into_fp8 import launch_codes

    return launch_codes(parts, weights, eps, cos, sin, interleaved)


def why_not_codes(weights: Sequence[Tensor | None], eps: float | None, dim: int) -> str | None:
    """Return why rows can't be written in FP8 without a look at them; None if they can.

    dim  channels of a head, which FP8 attention has a kernel for
    """
    if eps is None:
        return "nothing bounds rows that are not normed"
    if len(weights) > 2 or len({None if w is None else w.numel() for w in weights}) > 1:
        return "parts are more than two, or their weights differ in size"
    if dim % 16 or dim < 32:
        return f"heads of {dim} channels; the kernel takes multiples of 16 from 32"
    return None
