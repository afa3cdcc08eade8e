"""Attention of all queries to all keys: exact, or on 8-bit codes of q, k, P and v."""

import torch
from torch import Tensor

from .engines import MODES, Mode, run, why_not

__all__ = ["MODES", "Mode", "attention", "why_not"]


def attention(
    q_BTHd: Tensor,
    k_BSHd: Tensor,
    v_BSHd: Tensor,
    *,
    mode: Mode = "exact",
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute softmax(scale q kᵀ + mask) v, head by head; without gradients but for torch's own.

    q_BTHd   bf16, fp16 or float32, [B, T, H, hd]; rows may lie any distance apart
    k_BSHd   the same dtype, [B, S, H, hd]
    v_BSHd   the same dtype, [B, S, H, hd]
    mode     ``exact``: the fastest exact engine installed, torch's or FlashAttention-3. ``fp8``:
             may round q, k, P and v to 8 bits where that is faster (:mod:`.engines`): in FP8 by
             FlashAttention-3 (:mod:`..fp8_qkv.reference`), which CPUs compute too; or where that
             can't run by our kernel, INT8 for q and k (:mod:`.reference`). With neither it is
             exact, and says so once
    mask     broadcasts to [B, H, T, S]: bool (True: attend), or a float to add to the logits;
             exact by torch in both modes
    scale    factor of the logits; None: hd ** -0.5
    returns  q's dtype, [B, T, H, hd]; ``flatten(2)`` of it is a view, but for torch's unfused path

    Raises ValueError for shapes or dtypes that do not fit each other, and for an unknown mode.
    """
    _check(q_BTHd, k_BSHd, v_BSHd, mode)
    return run(q_BTHd, k_BSHd, v_BSHd, mask, scale, mode)


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
