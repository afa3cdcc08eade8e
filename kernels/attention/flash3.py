"""FlashAttention-3 (arXiv 2407.08608), from whichever package is installed.

Nothing is downloaded: of the hub's kernel, only one that this process has loaded before is used.
"""

import functools
import importlib
import logging
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..chip import say_once
from ..fp8_qkv import Codes

CHIP = 90
"""Hopper. Its kernels for other chips are FlashAttention-2's, which torch has too."""

INSTALL = "pip install 'dirotq[attention]'"

WIDEST, WIDEST_FP8 = 256, 128
"""Channels of the widest head: in 16 bits, and in FP8 (what ``fp8_qkv`` has kernels for)."""

NEEDED = ("q", "k", "v", "q_descale", "k_descale", "v_descale", "softmax_scale", "num_splits")
HUB = "kernels-community/flash-attn3"


def why_not(chip: int | None, head: int, dtype: torch.dtype, *, fp8: bool) -> str | None:
    """Return why heads of ``head`` channels can't take FlashAttention-3; None if they can.

    chip  compute capability (90: 9.0), or None for what is no NVIDIA GPU
    """
    if chip != CHIP:
        return "FlashAttention-3 needs a Hopper GPU"
    if dtype != torch.bfloat16:  # packages leave the kernels of float16 out to be small
        return f"FlashAttention-3 takes bfloat16, not {str(dtype).removeprefix('torch.')}"
    step, widest = (16, WIDEST_FP8) if fp8 else (8, WIDEST)
    if head % step or not 0 < head <= widest:
        kind = "in FP8" if fp8 else "in 16 bits"
        return (
            f"heads are {head} channels wide, and FlashAttention-3 {kind} takes multiples of "
            f"{step} up to {widest}"
        )
    if installed() is None:
        return f"FlashAttention-3 is not installed ({INSTALL})"
    return None


def exact(q_BTHd: Tensor, k_BSHd: Tensor, v_BSHd: Tensor, *, scale: float) -> Tensor:
    """Compute attention of bf16, contiguous [B, T, H, d]; where :func:`why_not` has no reason."""
    return _forward()(*map(_in_place, (q_BTHd, k_BSHd, v_BSHd)), softmax_scale=scale)


def fp8(codes: Codes, *, scale: float) -> Tensor:
    """Compute :func:`..fp8_qkv.reference.attend`: bf16, contiguous [B, T, H, d]."""
    return _forward()(
        codes.q_BTHd, codes.k_BSHd, codes.v_BSHd, softmax_scale=scale,
        q_descale=codes.q_scale_BH, k_descale=codes.k_scale_BH, v_descale=codes.v_scale_BH,
    )  # fmt: skip


@functools.cache
def installed() -> Callable[..., Tensor] | None:
    """Return FlashAttention-3 of the first package that has it, looked for once.

    It takes q, k and v, [B, T, H, d] each, and by keyword ``softmax_scale`` and the scales of FP8
    heads, float32 [B, H]: ``q_descale``, ``k_descale``, ``v_descale``.
    """
    return _operator("flash_attn_3") or _operator("fa3_fwd") or _loaded_from_hub()


def _forward() -> Callable[..., Tensor]:
    found = installed()
    if found is None:
        raise ImportError(f"FlashAttention-3 is not installed; {INSTALL}")
    return found


def _operator(package: str) -> Callable[..., Tensor] | None:
    """Return the operator of the official build (``flash_attn_3``) or of ``fa3-fwd``.

    Not their Python functions: those add an autograd function and a custom operator to each call.
    """
    if find_spec(package) is None:
        return None
    try:
        importlib.import_module(f"{package}._C")  # registers operators
        forward = getattr(torch.ops, package).fwd.default
    except (ImportError, OSError, AttributeError) as error:
        say_once(f"{package} is installed and does not load: {error}", logging.WARNING)
        return None
    missing = sorted(set(NEEDED) - {argument.name for argument in forward._schema.arguments})
    if missing:
        say_once(f"{package} knows no {', '.join(missing)}: update it", logging.WARNING)
        return None

    def call(q: Tensor, k: Tensor, v: Tensor, **scales: Any) -> Tensor:
        return forward(q, k, v, **scales, num_splits=1)[0]

    return call


def _loaded_from_hub() -> Callable[..., Tensor] | None:
    """Return the hub's, if ``kernels.get_kernel`` (diffusers' ``_flash_3_hub``) has loaded it."""
    loaded = getattr(sys.modules.get("kernels"), "get_loaded_kernels", None)
    for kernel in loaded() if loaded else ():
        if kernel.repo_info is not None and kernel.repo_info.repo_id == HUB:
            return functools.partial(_python_function, kernel.module)
    return None


def _python_function(module: ModuleType, q: Tensor, k: Tensor, v: Tensor, **scales: Any) -> Tensor:
    out = module.flash_attn_func(q, k, v, **scales)
    return out[0] if isinstance(out, tuple) else out


def _in_place(x: Tensor) -> Tensor:
    """Return x as the tensor memory accelerator reads it: channels side by side, all else at
    multiples of 16 bytes; a copy where it lies otherwise."""
    step = 16 // x.element_size()
    strides = x.stride()
    even = strides[3] == 1 and not any(n % step for n in strides[:3])
    if even and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
