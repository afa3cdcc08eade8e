"""GPTQ (Frantar et al., arXiv 2210.17323) with act-order and static grids (docs/method.md M5).

Computed as LDLQ (Chee et al., arXiv 2307.13304), which finds the same codes from one Cholesky
factor and no inverse. Letters: N outputs (the stacked rows of all linears of a site), K columns
in the order of rounding, G groups, B columns of a block.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..formats.quantize_weight import codes_on_grid, dequantize_weight, nearest_codes
from ..formats.weight import Element
from ..full_float32 import full_float32

BLOCK = 128
ESCALATIONS = 3
"""A failed Cholesky is retried with ten times the damping, at most this often."""

CHUNK = 1 << 26
"""Elements of the temporaries that are made row by row: 256 MiB of float32."""

Sweep = Callable[..., tuple[Tensor, Tensor]]
"""What :func:`sweep` is, or a kernel that computes the same of its four tensors."""


class FactorizationError(ArithmeticError):
    """The damped second moment could not be factored."""


def hessian_error(error_NK: Tensor, s_KK: Tensor) -> Tensor:
    """Compute e S eᵀ row by row, [N]: the expected squared output error of each row."""
    loss_N = error_NK.new_empty(len(error_NK))
    with full_float32():
        for rows in _chunks(error_NK):
            e_nK = error_NK[rows]
            loss_N[rows] = ((e_nK @ s_KK) * e_nK).sum(-1)
    return loss_N


def sweep(
    w_NB: Tensor,
    target_NB: Tensor,
    step_NB: Tensor,
    f_BB: Tensor,
    *,
    element: Element = "int4",
) -> tuple[Tensor, Tensor]:
    """Round the columns of one block from left to right (docs/method.md Eq. 10).

    w_NB       float, [N, B]: the weights
    target_NB  float, [N, B]: the weights and what the blocks before have left to them
    step_NB    float, [N, B] or [N, 1]: value of a code of 1; 0 gives the least code
    f_BB       float, [B, B], upper triangular with unit diagonal
    element    what a code is: ``int4`` in [-7, 7], ``lm4`` in units (kernels/formats/lm4.py), or
               ``e2m1`` in halves (kernels/formats/fp4.py)
    returns    codes, int8 [N, B], and errors w - code * step, like ``w_NB``
    """
    codes_NB = torch.empty_like(w_NB, dtype=torch.int8)
    error_NB = torch.empty_like(w_NB)
    steps = step_NB.expand_as(w_NB)
    for k in range(w_NB.shape[1]):
        wanted_N = target_NB[:, k] + error_NB[:, :k] @ f_BB[:k, k]
        q_N = nearest_codes(wanted_N, steps[:, k], element)
        error_NB[:, k] = w_NB[:, k] - q_N * steps[:, k]
        codes_NB[:, k] = q_N.to(torch.int8)
    return codes_NB, error_NB


def gptq(
    w_NK: Tensor,
    s_KK: Tensor,
    scale_NG: Tensor,
    *,
    damping: float,
    element: Element = "int4",
    sweep: Sweep = sweep,
) -> tuple[Tensor, dict[str, int]]:
    """Choose codes on the grid ``scale_NG`` by columns, each error passed on to later columns.

    w_NK      float32, [N, K]
    s_KK      float64, [K, K], the second moment of the linear's main-branch input; may be singular
    scale_NG  steps of the grid, [N, G], K a multiple of G; fixed before the loop (static groups):
              bf16 scales for ``int4``, else float32 (:func:`weight_steps`)
    damping   multiple of S's mean diagonal that is added to it; a direction that S does not see
              keeps its weight and is rounded like any other ("dead columns" are not zeroed)
    element   what a code is: ``int4``, ``lm4`` or ``e2m1`` (kernels/formats)
    sweep     what rounds the columns of a block; but for ``int4`` one that takes ``element``
    returns   int8 codes [N, K], and counts: ``escalations`` of the damping, and
              ``nearest`` rows that kept round-to-nearest because it was no worse in the metric S

    Besides ``s_KK`` at most two float64 [K, K] are alive at a time.

    Raises FactorizationError after ESCALATIONS tenfold increases of the damping.
    """
    if element != "int4":
        sweep = functools.partial(sweep, element=element)
    order = s_KK.diagonal().argsort(descending=True, stable=True)
    f_KK, escalations = _unit_factor(s_KK, order, damping, w_NK.dtype)
    codes = torch.empty_like(w_NK, dtype=torch.int8)
    codes[:, order] = _all_blocks(w_NK[:, order], scale_NG, order, f_KK, sweep)
    del f_KK

    s_w, kept = s_KK.to(w_NK.dtype), 0
    for rows in _chunks(w_NK):
        w, scale = w_NK[rows], scale_NG[rows]
        nearest = codes_on_grid(w, scale, element)
        ours = hessian_error(dequantize_weight(codes[rows], scale, w.dtype) - w, s_w)
        theirs = hessian_error(dequantize_weight(nearest, scale, w.dtype) - w, s_w)
        keep_n1 = (theirs <= ours)[:, None]
        codes[rows] = torch.where(keep_n1, nearest, codes[rows])
        kept += int(keep_n1.sum())
    return codes, {"escalations": escalations, "nearest": kept}


def _all_blocks(
    w_NK: Tensor, scale_NG: Tensor, order: Tensor, f_KK: Tensor, sweep: Sweep
) -> Tensor:
    """Choose codes in that order: a product for what earlier blocks left, then a sweep."""
    codes_NK = torch.empty_like(w_NK, dtype=torch.int8)
    error_NK = torch.empty_like(w_NK)
    scale_NG = scale_NG.to(w_NK.dtype)
    group_K = order // (w_NK.shape[1] // scale_NG.shape[1])
    with full_float32():
        for start in range(0, w_NK.shape[1], BLOCK):
            block = slice(start, start + BLOCK)
            w_NB = w_NK[:, block]
            target_NB = torch.addmm(w_NB, error_NK[:, :start], f_KK[:start, block])
            step_NB = scale_NG if scale_NG.shape[1] == 1 else scale_NG[:, group_K[block]]
            found = sweep(w_NB, target_NB, step_NB, f_KK[block, block])
            codes_NK[:, block], error_NK[:, block] = found
    return codes_NK


def _unit_factor(
    s_KK: Tensor, order: Tensor, damping: float, dtype: torch.dtype
) -> tuple[Tensor, int]:
    """Return F, upper triangular with unit diagonal, [K, K] in ``dtype``, and growths of damping.

    S + damp I = F diag(d) Fᵀ, its columns in the order of rounding: the lower Cholesky factor of
    the matrix with its columns backwards, turned back, its columns divided by their diagonal.
    """
    backwards = order.flip(0)
    h_KK = s_KK[backwards[:, None], backwards]
    mean = h_KK.diagonal().mean()
    diagonal_K = h_KK.diagonal().clone()
    for escalation in range(ESCALATIONS + 1):
        h_KK.diagonal().copy_(diagonal_K + damping * 10**escalation * mean)
        lower_KK, failed = torch.linalg.cholesky_ex(h_KK)
        # What is not finite anywhere reaches the diagonal of its row.
        if not failed and bool(lower_KK.diagonal().isfinite().all()):
            del h_KK
            lower_KK /= lower_KK.diagonal().clone()
            return lower_KK.to(dtype).flip(0, 1), escalation
        del lower_KK
    raise FactorizationError(
        f"the second moment ({len(s_KK)} channels, mean diagonal {mean:.3g}) is not positive "
        f"definite even with damping {damping * 10**ESCALATIONS:g}"
    )


def _chunks(rows_NK: Tensor) -> Iterator[slice]:
    """Yield slices of rows with about CHUNK elements each."""
    size = max(CHUNK // rows_NK.shape[1], 1)
    for start in range(0, len(rows_NK), size):
        yield slice(start, start + size)
