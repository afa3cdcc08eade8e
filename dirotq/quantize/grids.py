"""Grids beside the one that the clip search chose, among which GPTQ takes the best of each row.

Letters: N outputs, G groups per row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dirotq.errors import ConfigError
from dirotq.kernels.formats.quantize_weight import weight_steps
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.quantize.nearest import Rounded

APART = 0.02
"""Between neighbouring scales: further apart the outer ones rarely win, closer they differ less."""


def neighbours(rounded: Rounded, spec: QuantSpec, count: int) -> list[Rounded]:
    """Return ``rounded`` and the grids of ``count`` - 1 scales around its own.

    All groups of a row are scaled alike. No scale falls below the row's floor. The codes are those
    of ``rounded``: whoever takes a grid chooses its codes.

    count  odd

    Raises ConfigError if ``count`` is above 1 and scales are bytes, whose steps are coarser.
    """
    if count > 1 and rounded.wscale.dtype != torch.bfloat16:
        raise ConfigError(
            f"gptq.scales={count}: scales of {spec.weights.name} are bytes, too coarse to try "
            "several. Use gptq.scales=1, or a weight_format with bf16 scales (lm4_channel)"
        )
    grids = [rounded]
    for i in range(1, count // 2 + 1):
        for factor in (1 - i * APART, 1 + i * APART):
            wscale = (rounded.wscale.float() * factor).to(torch.bfloat16)
            if rounded.floor is not None:
                wscale = torch.maximum(wscale, rounded.floor)
            step = weight_steps(wscale, None, spec.weights.element)
            grids.append(rounded._replace(wscale=wscale, step=step))
    return grids


def by_row(grids: Sequence[Rounded], taken_N: Tensor, codes_NK: Tensor) -> Rounded:
    """Return codes with the grid that each row took.

    taken_N   int64, [N]: index of a row's grid
    codes_NK  int8, [N, K]
    """
    if len(grids) == 1:
        return grids[0]._replace(codes=codes_NK)
    rows = torch.arange(len(taken_N), device=taken_N.device)
    wscale = torch.stack([grid.wscale for grid in grids])[taken_N, rows]
    step = torch.stack([grid.step for grid in grids])[taken_N, rows]
    return grids[0]._replace(codes=codes_NK, wscale=wscale, step=step)
