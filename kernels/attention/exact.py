"""Exact attention: torch's, by cuDNN where it is the fastest."""

import logging

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..chip import capability, say_once

CUDNN_CHIP = 90
"""Oldest chip on which cuDNN is asked first: twice as fast as flash attention on Hopper. Newer
versions of torch do so by themselves."""

OTHERS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(
    q_BTHd: Tensor,
    k_BSHd: Tensor,
    v_BSHd: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q kᵀ + mask) v (:func:`dirotq.kernels.attention.attention`), [B, T, H, hd].

    Copies nothing: torch gets transposed views, and fused backends lay their output out as q.
    """
    q_BHTd, k_BHSd, v_BHSd = (t.transpose(1, 2) for t in (q_BTHd, k_BSHd, v_BSHd))

    def product() -> Tensor:
        out = scaled_dot_product_attention(q_BHTd, k_BHSd, v_BHSd, attn_mask=mask, scale=scale)
        return out.transpose(1, 2)

    if not _by_cudnn(q_BHTd, k_BHSd, v_BHSd, mask):
        return product()
    # Not by `set_priority`: what it restores is not the order that torch itself would have set on
    # its first call, and everybody's attention in the process would be slower from then on.
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return product()
    except RuntimeError as error:
        # cuDNN takes some calls that it then finds no plan for, and says so only when it runs.
        if "cudnn" not in str(error).lower():
            raise
        say_once(f"cuDNN's attention failed and another backend runs: {error}", logging.WARNING)
    with sdpa_kernel(OTHERS):
        return product()


def _by_cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether cuDNN takes these, and is wanted."""
    if (capability(q.device) or 0) < CUDNN_CHIP:
        return False
    cuda = torch.backends.cuda
    return cuda.can_use_cudnn_attention(cuda.SDPAParams(q, k, v, mask, 0.0, False, False))
