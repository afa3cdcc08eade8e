"""GPTQ: codes on a fixed grid that minimise the error in the metric of the second moment."""

import logging

from torch import Tensor

from ..chip import capability, say_once, why_reference
from ..formats.weight import Element
from . import reference
from .reference import FactorizationError, hessian_error

__all__ = ["FactorizationError", "gptq", "hessian_error"]


def gptq(
    w_NK: Tensor, s_KK: Tensor, scale_NG: Tensor, *, damping: float, element: Element = "int4"
) -> tuple[Tensor, dict[str, int]]:
    """Choose codes on the grid ``scale_NG``, int8 [N, K], and counts: see :func:`.reference.gptq`.

    On an NVIDIA GPU a Triton kernel rounds float32 weights to INT4 or LM4, a block of columns at a
    time. FP4, other devices and dtypes take the reference's loop.
    """
    sweep = _sweep(w_NK, element)
    return reference.gptq(w_NK, s_KK, scale_NG, damping=damping, element=element, sweep=sweep)


def _sweep(w_NK: Tensor, element: Element = "int4") -> reference.Sweep:
    if element == "e2m1":
        if w_NK.device.type == "cuda":
            say_once(
                "GPTQ rounds FP4 columns in plain torch: its kernel knows INT4 and LM4",
                logging.INFO,
            )
        return reference.sweep
    if w_NK.device.type == "cuda" and w_NK.element_size() == 4:
        reason = why_reference(capability(w_NK.device))
        if reason is None:
            from .kernel import launch

            return launch
        say_once(f"GPTQ rounds columns in plain torch, slowly: {reason}", logging.WARNING)
    return reference.sweep
