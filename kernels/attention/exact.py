"""Exact attention: torch's, by the backend that torch takes for the fastest on the chip.

On Hopper that is cuDNN from torch 2.11 on, twice as fast as flash attention there. Asking for it is
no business of ours: torch's switches are the whole process's, other threads' included, and its
order of backends, once set, can't be put back to what torch would have chosen by itself.
"""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


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
    out = scaled_dot_product_attention(q_BHTd, k_BHSd, v_BHSd, attn_mask=mask, scale=scale)
    return out.transpose(1, 2)
