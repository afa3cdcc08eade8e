"""Coordinate descent on codes that GPTQ chose (docs/method.md Eq. 15).

GPTQ rounds a column once, before it knows how later columns err. Letters: N outputs, K columns,
G groups, B columns of a block.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..formats.quantize_weight import dequantize_weight
from ..full_float32 import full_float32


def descend(
    w_NK: Tensor,
    h_KK: Tensor,
    step_NG: Tensor,
    codes_NK: Tensor,
    *,
    rounds: int,
    sweep: Callable[..., tuple[Tensor, Tensor]],
    block: int,
) -> Tensor:
    """Give each column in turn the code that loses least beside all other columns as they are.

    No step raises a row's loss e H eᵀ. What other blocks ask of a block is one product; within the
    block it is GPTQ's own sweep with another triangle.

    w_NK      floating, [N, K]
    h_KK      like ``w_NK``, [K, K]: the metric, symmetric, with a positive diagonal
    step_NG   steps of the grid, [N, G], K a multiple of G
    codes_NK  int8, [N, K], where the descent begins
    rounds    how often each column has its turn
    sweep     :func:`.reference.sweep` or its kernel, for the codes' element
    block     columns of a block, B
    returns   int8, [N, K]
    """
    steps = step_NG.to(w_NK.dtype)
    group = w_NK.shape[1] // steps.shape[1]
    codes_NK = codes_NK.clone()
    error_NK = w_NK - dequantize_weight(codes_NK, steps, w_NK.dtype)
    with full_float32():
        for start in [*range(0, w_NK.shape[1], block)] * rounds:
            at = slice(start, start + block)
            f_KB = h_KK[:, at] / h_KK.diagonal()[at]
            f_BB = f_KB[at].triu()
            f_KB[at] -= f_BB  # what is left counts columns to the right, by their errors so far
            target_NB = torch.addmm(w_NK[:, at], error_NK, f_KB)
            columns = torch.arange(*at.indices(w_NK.shape[1]), device=steps.device)
            step_NB = steps if steps.shape[1] == 1 else steps[:, columns // group]
            codes_NK[:, at], error_NK[:, at] = sweep(w_NK[:, at], target_NB, step_NB, f_BB)
    return codes_NK
