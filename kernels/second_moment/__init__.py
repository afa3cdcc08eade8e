"""XᵀX of activations, added up over calls and kept as its lower block triangle."""

import logging

from torch import Tensor

from ..chip import capability, say_once, why_reference
from . import reference
from .reference import TILE, new, tiles, trace, unpack

__all__ = ["TILE", "accumulate", "new", "tiles", "trace", "unpack"]


def accumulate(total_LBB: Tensor, x_TD: Tensor) -> None:
    """Add XᵀX to a block triangle in place (:func:`.reference.accumulate`, docs/method.md Eq. 1).

    total_LBB  float32, [tiles(D), TILE, TILE], from :func:`new`
    x_TD       bf16, fp16 or float32, [T, D], on the same device; rows may lie any distance apart

    On an NVIDIA GPU a Triton kernel adds up 16-bit activations; float32 ones, which matrix units
    would round, and other devices take the reference. The result does not depend on timing.

    Raises ValueError if ``total_LBB`` was not made for D channels.
    """
    reference.check(total_LBB, x_TD)
    if x_TD.device.type == "cuda" and x_TD.element_size() == 2:
        reason = why_reference(capability(x_TD.device))
        if reason is None:
            from .kernel import launch

            return launch(total_LBB, x_TD)
        say_once(f"second moments are added up by plain torch: {reason}", logging.WARNING)
    return reference.accumulate(total_LBB, x_TD)
