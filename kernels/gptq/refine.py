"""What GPTQ leaves on the table: the order of its columns, and a descent from its codes.

See docs/method.md M5. Letters: N outputs, K columns, G groups, B columns of a block.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..formats.quantize_weight import dequantize_weight
from ..full_float32 import full_float32


def conditional_order(s_KK: Tensor, damping: float, block: int) -> Tensor:
    """Order columns by the variance that those after them leave of them, the least one last.

    A column's error costs what the columns after it can't make up for: its variance given theirs
    (``d`` of docs/method.md M5). The product of these is the determinant, whatever the order; their
    sum is small where they are alike. So the last column is that of the least variance, the one
    before it that of the least variance given the last, and so on. This is a Cholesky factorization
    with the least pivot, its updates delayed by a block.

    s_KK     float64, [K, K], the second moment
    damping  multiple of its mean diagonal that is added to it
    block    columns between updates of the whole matrix
    returns  int64, [K], the first column to round first
    """
    rest_KK, size = s_KK.clone(), len(s_KK)
    damp = damping * s_KK.diagonal().mean()
    rest_KK.diagonal().add_(damp)
    variance_K = rest_KK.diagonal().clone()
    backwards = torch.empty(size, dtype=torch.int64, device=s_KK.device)
    for start in range(0, size, block):
        rows_BK = rest_KK.new_zeros(min(block, size - start), size)
        for i in range(len(rows_BK)):
            least, k_1 = variance_K.min(0, keepdim=True)
            backwards[start + i] = k_1[0]
            given_i = rows_BK[:i].index_select(1, k_1)[:, 0]
            row_K = rest_KK.index_select(0, k_1)[0] - given_i @ rows_BK[:i]
            variance_K.index_fill_(0, k_1, torch.inf)  # has had its turn
            # Only a moment that can't be factored has pivots below what was added to it.
            row_K = row_K.masked_fill(variance_K.isinf(), 0.0) / torch.maximum(least, damp).sqrt()
            rows_BK[i] = row_K
            variance_K -= row_K.square()
        rest_KK.addmm_(rows_BK.mT, rows_BK, alpha=-1)
    return backwards.flip(0)


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

    GPTQ rounds a column once, before it knows how later ones err (docs/method.md Eq. 15). No step
    raises a row's loss e H eᵀ. What other blocks ask of a block is one product; within the block it
    is GPTQ's own sweep with another triangle.

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
