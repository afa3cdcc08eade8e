"""Exact attention: torch's, with the backend that is fastest on the chip asked first."""

import logging

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..chip import capability, say_once

ORDER = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
"""On Hopper and newer. Torch asks them in turn and takes the first that knows mask and shape."""

CUDNN_CHIP = 90
"""Oldest chip with an order of ours; on others torch's own is as good."""


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
        return scaled_dot_product_attention(q_BHTd, k_BHSd, v_BHSd, attn_mask=mask, scale=scale)

    if (capability(q_BTHd.device) or 0) < CUDNN_CHIP:
        return product().transpose(1, 2)
    try:
        with sdpa_kernel(list(ORDER), set_priority=True):
            return product().transpose(1, 2)
    except RuntimeError as error:
        # cuDNN takes some calls that it then finds no plan for, and says so only when it runs.
        if "cudnn" not in str(error).lower():
            raise
        say_once(f"cuDNN's attention failed and another backend runs: {error}", logging.WARNING)
    with sdpa_kernel(list(ORDER[1:]), set_priority=True):
        return product().transpose(1, 2)
