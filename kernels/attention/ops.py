"""``torch.ops.dirotq.attention``: attention as one operator, in the layout of torch's own.

One operator, so that the engine is chosen when it runs. Defined by hand: a call through
``torch.library.custom_op`` takes 130 µs of host time more.
"""

import torch
from torch import Tensor

from .engines import run

LIBRARY = torch.library.Library("dirotq", "FRAGMENT")
LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale, str mode) -> Tensor",
    # The compiler may not reorder what the engines read in rows.
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def attention(
    q_BHTd: Tensor,
    k_BHSd: Tensor,
    v_BHSd: Tensor,
    mask: Tensor | None,
    scale: float | None,
    mode: str,
) -> Tensor:
    """Compute attention of arguments that :func:`.redirect.plain` allows, without gradients.

    q_BHTd   [B, H, T, d], rows and heads any distance apart
    k_BHSd   the same dtype, [B, H, S, d]; v_BHSd likewise
    mask     as :func:`.engines.run` takes it, as ``scale`` and ``mode``
    returns  q's dtype, [B, H, T, d] of memory [B, T, H, d]: ``transpose(1, 2).flatten(2)`` of it is
             a view
    """
    q_BTHd, k_BSHd, v_BSHd = (t.transpose(1, 2) for t in (q_BHTd, k_BHSd, v_BHSd))
    return run(q_BTHd, k_BSHd, v_BSHd, mask, scale, mode).contiguous().transpose(1, 2)


def _fake(
    q_BHTd: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, mode: str
) -> Tensor:
    b, h, t, d = q_BHTd.shape
    return q_BHTd.new_empty((b, t, h, d)).transpose(1, 2)


LIBRARY.impl("attention", attention, "CPU")
LIBRARY.impl("attention", attention, "CUDA")
torch.library.register_fake("dirotq::attention", _fake, lib=LIBRARY)
