"""Attention of all queries to all keys: exact, or on 8-bit codes of q, k, P and v."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..build import FP8_CHIPS
from ..chip import capability, why_reference
from . import reference

__all__ = ["MODES", "Mode", "attention", "why_not"]

Mode = Literal["exact", "fp8"]
MODES: tuple[Mode, ...] = ("exact", "fp8")

MAX_HEAD = 128
"""Widest head: sums of 128 products of INT8 codes stay below 2^22, which the kernel counts on."""


def attention(
    q_BTHd: Tensor,
    k_BSHd: Tensor,
    v_BSHd: Tensor,
    *,
    mode: Mode = "exact",
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute softmax(scale q kᵀ + mask) v, head by head.

    q_BTHd   bf16, fp16 or float32, [B, T, H, hd]; rows may lie any distance apart
    k_BSHd   the same dtype, [B, S, H, hd]
    v_BSHd   the same dtype, [B, S, H, hd]
    mode     ``exact``: torch's, by the fastest exact backend of the chip. ``fp8``: INT8 codes of q
             and k, FP8-E4M3 ones of P and v (:mod:`.reference`), by Triton kernels on GPUs whose
             matrix units take FP8 and by the reference on CPUs
    mask     broadcasts to [B, H, T, S]: bool (True: attend), or a float to add to the logits. Only
             ``exact`` knows masks: with one, ``fp8`` computes exactly
    scale    factor of the logits, not negative for ``fp8``; None: hd ** -0.5
    returns  q's dtype, [B, T, H, hd]; ``flatten(2)`` of it is a view, but for torch's unfused path

    Raises ValueError for shapes that do not fit each other, for an unknown mode, and for ``fp8`` on
    a GPU or with a head width that it has no kernel for (:func:`why_not`).
    """
    _check(q_BTHd, k_BSHd, v_BSHd, mode)
    if mode == "exact" or mask is not None:
        # Torch takes the fastest backend: on Hopper cuDNN, from torch 2.11 on. Asking for one is no
        # business of ours: those switches are the whole process's.
        q_BHTd, k_BHSd, v_BHSd = (t.transpose(1, 2) for t in (q_BTHd, k_BSHd, v_BSHd))
        out = scaled_dot_product_attention(q_BHTd, k_BHSd, v_BHSd, attn_mask=mask, scale=scale)
        return out.transpose(1, 2)
    scale = 1 / math.sqrt(q_BTHd.shape[-1]) if scale is None else scale
    if scale < 0:  # the kernel looks for the largest product before it multiplies
        raise ValueError(f"8-bit attention can't use a scale of {scale}; negate q instead")
    chip = capability(q_BTHd.device)
    if q_BTHd.device.type == "cpu":
        return reference.attention(q_BTHd, k_BSHd, v_BSHd, scale=scale)
    if reason := why_not(chip, q_BTHd.shape[-1]):
        raise ValueError(reason)
    from .kernel import launch

    return launch(q_BTHd, k_BSHd, v_BSHd, scale=scale)


def why_not(chip: int | None, head: int = MAX_HEAD) -> str | None:
    """Return why heads of ``head`` channels have no 8-bit attention on a chip; None if they have.

    chip  compute capability (90: 9.0), or None for what is no NVIDIA GPU
    """
    if reason := why_reference(chip):
        return f"8-bit attention can't run: {reason}; use mode='exact'"
    assert chip is not None
    if chip < FP8_CHIPS[0]:
        return (
            f"8-bit attention can't run: the GPU has compute capability {chip / 10}, and FP8 takes "
            f"{FP8_CHIPS[0] / 10} or newer; use mode='exact'"
        )
    if not 0 < head <= MAX_HEAD:
        return (
            f"8-bit attention can't run: heads are {head} channels wide, and the kernel takes 1 to "
            f"{MAX_HEAD}; use mode='exact'"
        )
    return None


def _check(q_BTHd: Tensor, k_BSHd: Tensor, v_BSHd: Tensor, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"attention has no mode {mode!r}; there are {' and '.join(MODES)}")
    shapes = [tuple(t.shape) for t in (q_BTHd, k_BSHd, v_BSHd)]
    q, k, v = shapes
    if len(q) != 4 or len(k) != 4 or k != v or (q[0], *q[2:]) != (k[0], *k[2:]):
        raise ValueError(
            f"q, k and v have shapes {q}, {k} and {v}; attention takes [B, T, H, hd] and twice "
            "[B, S, H, hd]: unflatten the heads, and repeat keys that heads share"
        )
    dtypes = {t.dtype for t in (q_BTHd, k_BSHd, v_BSHd)}
    if len(dtypes) > 1 or not torch.is_floating_point(q_BTHd):
        found = ", ".join(str(t.dtype) for t in (q_BTHd, k_BSHd, v_BSHd))
        raise ValueError(f"q, k and v are {found}; attention takes one floating dtype: cast them")
