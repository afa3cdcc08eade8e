"""Which engine computes an attention, and its call."""

import logging
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..build import FP8_CHIPS
from ..chip import capability, say_once, why_reference
from ..fp8_qkv import reference as fp8_reference
from . import flash3

Mode = Literal["exact", "fp8"]
MODES: tuple[Mode, ...] = ("exact", "fp8")

Engine = Literal["torch", "flash3", "flash3 fp8", "int8", "fp8 reference"]

LONG = 4096
"""Queries and keys from which FlashAttention-3 is ahead of torch on Hopper, in both modes.
Measured: behind at 1536, ahead at 4096 and 4608 (docs/speed.md)."""

LONG_INT8 = 8192
"""From which our kernel is. Measured: behind at 4608, ahead at 16896."""

MAX_HEAD = 128
"""Widest head of our kernel: sums of 128 products of INT8 codes stay below 2^22, which it needs."""


def run(
    q_BTHd: Tensor, k_BSHd: Tensor, v_BSHd: Tensor, mask: Tensor | None, scale: float | None,
    mode: str,
) -> Tensor:  # fmt: skip
    """Compute softmax(scale q kᵀ + mask) v, head by head; without gradients but for torch's own.

    q_BTHd   bf16, fp16 or float32, [B, T, H, d]; rows may lie any distance apart
    k_BSHd   the same dtype, [B, S, H, d]; v_BSHd likewise
    mask     broadcasts to [B, H, T, S]: bool (True: attend), or a float to add to the logits;
             exact by torch in both modes
    scale    factor of the logits; None: d ** -0.5
    mode     ``exact``: the fastest exact engine installed, torch's or FlashAttention-3. ``fp8``:
             may round q, k, P and v to 8 bits where that is faster: in FP8 by FlashAttention-3
             (:mod:`..fp8_qkv.reference`), which CPUs compute too; or where that can't run by our
             kernel, INT8 for q and k (:mod:`.reference`). With neither it is exact, and says so
             once
    returns  q's dtype, [B, T, H, d]; ``flatten(2)`` of it is a view, but for torch's unfused path
    """
    engine = choose(q_BTHd, k_BSHd, mask, scale, mode)
    if engine == "torch":
        q_BHTd, k_BHSd, v_BHSd = (t.transpose(1, 2) for t in (q_BTHd, k_BSHd, v_BSHd))
        out = scaled_dot_product_attention(q_BHTd, k_BHSd, v_BHSd, attn_mask=mask, scale=scale)
        return out.transpose(1, 2)
    scale = q_BTHd.shape[-1] ** -0.5 if scale is None else scale
    if engine == "flash3":
        return flash3.exact(q_BTHd, k_BSHd, v_BSHd, scale=scale)
    if engine == "flash3 fp8":
        from ..fp8_qkv.kernel import launch as launch_codes

        return flash3.fp8(launch_codes(q_BTHd, k_BSHd, v_BSHd), scale=scale)
    if engine == "int8":
        from .kernel import launch

        return launch(q_BTHd, k_BSHd, v_BSHd, scale=scale)
    return fp8_reference.attention(q_BTHd, k_BSHd, v_BSHd, scale=scale)


def choose(
    q_BTHd: Tensor, k_BSHd: Tensor, mask: Tensor | None, scale: float | None, mode: str
) -> Engine:
    """Return the engine of one attention.

    Torch's own computes what the others don't: masks, scales that are not positive, and whatever is
    called while its backends are restricted (``sdpa_kernel``, diffusers' ``_native_*``).
    """
    positive = scale is None or scale > 0  # the others look for maxima before they multiply
    if mask is not None or not positive or q_BTHd.numel() == 0 or k_BSHd.numel() == 0:
        return "torch"
    if not unrestricted():
        if mode == "fp8":
            say_once(
                "attention='fp8' computes exactly: torch's backends are restricted", logging.INFO
            )
        return "torch"
    if mode == "fp8" and (eight := _eight_bits(q_BTHd, k_BSHd)):
        return eight
    head, dtype = q_BTHd.shape[-1], q_BTHd.dtype
    if _tokens(q_BTHd, k_BSHd) < LONG:
        return "torch"
    reason = flash3.why_not(capability(q_BTHd.device), head, dtype, fp8=False)
    return "torch" if reason else "flash3"


def why_not(
    chip: int | None, head: int = MAX_HEAD, dtype: torch.dtype = torch.bfloat16
) -> str | None:
    """Return why heads of ``head`` channels can't take our 8-bit kernel; None if they can.

    chip  compute capability (90: 9.0), or None for what is no NVIDIA GPU
    """
    if reason := why_reference(chip):
        return reason
    assert chip is not None
    if chip < FP8_CHIPS[0]:
        return (
            f"the GPU has compute capability {chip / 10}, and FP8 takes {FP8_CHIPS[0] / 10} or "
            "newer"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{str(dtype).removeprefix('torch.')} is computed as specified"
    if not 0 < head <= MAX_HEAD:
        return f"heads are {head} channels wide, and our 8-bit kernel takes 1 to {MAX_HEAD}"
    return None


def unrestricted() -> bool:
    """Tell whether torch may choose among all of its backends."""
    cuda = torch.backends.cuda
    return (
        cuda.cudnn_sdp_enabled()
        and cuda.flash_sdp_enabled()
        and cuda.mem_efficient_sdp_enabled()
        and cuda.math_sdp_enabled()
    )


def _eight_bits(q_BTHd: Tensor, k_BSHd: Tensor) -> Engine | None:
    """Return the 8-bit engine; None where exact attention is faster, and where none runs: that is
    said once."""
    if q_BTHd.device.type == "cpu":
        return "fp8 reference"
    tokens, head, dtype = _tokens(q_BTHd, k_BSHd), q_BTHd.shape[-1], q_BTHd.dtype
    if tokens < LONG:
        return None
    chip = capability(q_BTHd.device)
    missing = flash3.why_not(chip, head, dtype, fp8=True)
    if missing is None:
        return "flash3 fp8"
    if reason := why_not(chip, head, dtype):
        both = f"{missing}; {reason}" if chip == flash3.CHIP else reason
        say_once(f"attention='fp8' computes exactly: {both}", logging.WARNING)
        return None
    if chip == flash3.CHIP:
        late = f"our own 8-bit kernel, slower, takes {LONG_INT8} tokens and more"
        say_once(f"attention='fp8': {missing}; {late}", logging.WARNING)
    return "int8" if tokens >= LONG_INT8 else None


def _tokens(q_BTHd: Tensor, k_BSHd: Tensor) -> int:
    return min(q_BTHd.shape[1], k_BSHd.shape[1])
