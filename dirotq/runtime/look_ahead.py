"""The norm that the next block begins with, computed together with this block's last residual.

Blocks know nothing of each other in diffusers: anything may happen to the residual stream between
two of them (ControlNet adds to it, a hook may write into it). So what was computed ahead is used
only for the very tensor that it was computed from, unchanged, and is computed again otherwise.

Letters: B images, T tokens, D channels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dirotq.kernels.gated_residual import gated_residual, gated_residual_norm
from dirotq.kernels.prologue import Prologue, modulated_norm

from .accelerate import Shared


@dataclass(frozen=True, slots=True)
class Ahead:
    """The norm of ``x`` as the owner of the modulator ``linear`` will want it for ``temb``."""

    linear: Any
    temb: Tensor
    x: Tensor
    version: int
    prologue: Prologue


def norm_ahead(
    shared: Shared, norm: Any, x_BTD: Tensor, temb_BD: Tensor, scale: Tensor, shift: Tensor
) -> Prologue:
    """Return a block's first norm (``norm.linear`` its modulator): the one computed ahead, if it is
    of this x, or a new one."""
    for ahead in shared.ahead:
        if ahead.linear is norm.linear and ahead.temb is temb_BD and _unchanged(ahead, x_BTD):
            return ahead.prologue
    return modulated_norm(x_BTD, scale, shift, eps=norm.norm.eps)


def last_residual(
    shared: Shared, norm: Any | None, x_BTD: Tensor, gate: Tensor, y_BTD: Tensor, temb_BD: Tensor
) -> tuple[Tensor, tuple[Ahead, ...]]:
    """Return x + gate * y, and the next block's first norm of it.

    norm     that the next block begins with, shift and scale first of its modulation; None: there
             is none
    returns  what belongs into ``shared.ahead``: nothing where the next modulation is not known yet
             (offloading), or where nobody could see that x was changed in between
    """
    known = None
    if norm is not None and shared.modulators is not None and _watched(x_BTD):
        known = shared.modulators.known(norm.linear, temb_BD)
    if norm is None or known is None:
        return gated_residual(x_BTD, gate, y_BTD), ()
    d = x_BTD.shape[-1]
    x, prologue = gated_residual_norm(
        x_BTD, gate, y_BTD, known[:, d : 2 * d], known[:, :d], eps=norm.norm.eps
    )
    return x, (Ahead(norm.linear, temb_BD, x, x._version, prologue),)


def _watched(x: Tensor) -> bool:
    """Tell whether a change in place leaves a trace, and blocks don't clip in between (float16)."""
    return x.dtype != torch.float16 and not torch.is_inference_mode_enabled()


def _unchanged(ahead: Ahead, x: Tensor) -> bool:
    mine = ahead.x
    return (
        x.data_ptr() == mine.data_ptr()
        and x.shape == mine.shape
        and x.stride() == mine.stride()
        and not x.is_inference()
        and x._version == mine._version == ahead.version
    )
