"""A block's output joins the residual stream: x + gate * y."""

import torch
from torch import Tensor

from ..chip import capability, why_reference
from . import reference

__all__ = ["gated_residual"]


def gated_residual(x_BTD: Tensor, gate_BD: Tensor, y_BTD: Tensor) -> Tensor:
    """x + gate * y, [B, T, D] in x's dtype (:mod:`.reference`).

    An NVIDIA GPU takes bf16 and fp16 in one pass, rounded once.
    """
    fast = x_BTD.is_cuda and x_BTD.dtype in (torch.bfloat16, torch.float16)
    if fast and not torch.compiler.is_compiling() and not why_reference(capability(x_BTD.device)):
        from .kernel import launch

        return launch(x_BTD, gate_BD, y_BTD)
    return reference.gated_residual(x_BTD, gate_BD, y_BTD)
