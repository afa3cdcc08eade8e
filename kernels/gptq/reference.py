"""GPTQ (Frantar et al., arXiv 2210.17323) with act-order and static grids (docs/method.md M5).

Computed as LDLQ (Chee et al., arXiv 2307.13304), which finds the same codes from one Cholesky
factor and no inverse. Letters: N outputs (the stacked rows of all linears of a site), K columns
in the order of rounding, G groups, B columns of a block.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..formats.quantize_weight import codes_on_grid, dequantize_weight, nearest_codes
from ..formats.weight import Element
from ..full_float32 import full_float32
from .refine import conditional_order, descend

BLOCK = 128
ESCALATIONS = 3
"""A failed Cholesky is retried with ten times the damping, at most this often."""

CHUNK = 1 << 26
"""Elements of the temporaries that are made row by row: 256 MiB of float32."""

Order = Literal["variance", "conditional"]

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

    scale_NG  steps of the grid, [N, G]: see :func:`best_codes`, which tells the rest too
    returns   int8 codes [N, K], and counts
    """
    codes, _, counts = best_codes(
        w_NK, s_KK, [scale_NG], damping=damping, element=element, sweep=sweep
    )
    return codes, counts


def best_codes(
    w_NK: Tensor,
    s_KK: Tensor,
    grids: Sequence[Tensor],
    *,
    damping: float,
    order: Order = "variance",
    descent: int = 0,
    element: Element = "int4",
    sweep: Sweep = sweep,
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Choose codes on the grid that serves a row best, then change them while that helps.

    Each row takes the grid on which GPTQ loses least in the metric of the damped second moment.
    Rounds of coordinate descent follow in the same metric (docs/method.md Eq. 15). One grid and no
    round is plain GPTQ.

    w_NK      float32, [N, K]
    s_KK      float64, [K, K], the second moment of the linear's main-branch input; may be singular
    grids     one or more; each holds steps, [N, G], K a multiple of G, that are fixed before the
              loop (static groups): bf16 scales for ``int4``, else float32 (:func:`weight_steps`)
    damping   multiple of S's mean diagonal that is added to it; a direction that S does not see
              keeps its weight and is rounded like any other ("dead columns" are not zeroed)
    order     of columns: ``variance``, the largest first (act-order), or ``conditional``
              (:func:`conditional_order`)
    descent   rounds of coordinate descent over all columns
    element   what a code is: ``int4``, ``lm4`` or ``e2m1`` (kernels/formats)
    sweep     what rounds the columns of a block; but for ``int4`` one that takes ``element``
    returns   int8 codes [N, K]; int64 [N], the grid that each row took; and counts:
              ``escalations`` of the damping, and ``nearest`` rows that kept round-to-nearest on the
              first grid because it was no worse in the metric S

    Besides ``s_KK`` at most two float64 [K, K] are alive at a time.

    Raises FactorizationError after ESCALATIONS tenfold increases of the damping.
    """
    if element != "int4":
        sweep = functools.partial(sweep, element=element)
    if order == "conditional":
        order_K = conditional_order(s_KK, damping, BLOCK)
    else:
        order_K = s_KK.diagonal().argsort(descending=True, stable=True)
    f_KK, escalations = _unit_factor(s_KK, order_K, damping, w_NK.dtype)
    codes, h_KK = _rounded(w_NK, grids[0], order_K, f_KK, sweep), s_KK
    taken_N, step_NG = torch.zeros(len(w_NK), dtype=torch.int64, device=w_NK.device), grids[0]
    if descent or len(grids) > 1:
        h_KK = s_KK.to(w_NK.dtype, copy=True)
        h_KK.diagonal().add_(damping * 10**escalations * s_KK.diagonal().mean())
    if len(grids) > 1:
        least_N = _losses(w_NK, codes, step_NG, h_KK)
        for i, grid in enumerate(grids[1:], 1):
            tried = _rounded(w_NK, grid, order_K, f_KK, sweep)
            loss_N = _losses(w_NK, tried, grid, h_KK)
            better_N1 = (loss_N < least_N)[:, None]
            codes = torch.where(better_N1, tried, codes)
            step_NG = torch.where(better_N1, grid, step_NG)
            taken_N.masked_fill_(better_N1[:, 0], i)
            least_N = torch.minimum(loss_N, least_N)
    del f_KK
    if descent:
        codes = descend(w_NK, h_KK, step_NG, codes, rounds=descent, sweep=sweep, block=BLOCK)
    del h_KK

    s_w = s_KK.to(w_NK.dtype)
    nearest = codes_on_grid(w_NK, grids[0], element)
    keep_N = _losses(w_NK, nearest, grids[0], s_w) <= _losses(w_NK, codes, step_NG, s_w)
    codes = torch.where(keep_N[:, None], nearest, codes)
    return codes, taken_N.masked_fill(keep_N, 0), {
        "escalations": escalations, "nearest": int(keep_N.sum()),
    }  # fmt: skip


def _rounded(w_NK: Tensor, step_NG: Tensor, order: Tensor, f_KK: Tensor, sweep: Sweep) -> Tensor:
    """Return GPTQ's codes on one grid, int8 [N, K]."""
    codes = torch.empty_like(w_NK, dtype=torch.int8)
    codes[:, order] = _all_blocks(w_NK[:, order], step_NG, order, f_KK, sweep)
    return codes


def _losses(w_NK: Tensor, codes_NK: Tensor, step_NG: Tensor, s_KK: Tensor) -> Tensor:
    """Return each row's loss in the metric ``s_KK``, [N]."""
    return torch.cat(
        [
            hessian_error(dequantize_weight(codes_NK[r], step_NG[r], w_NK.dtype) - w_NK[r], s_KK)
            for r in _chunks(w_NK)
        ]
    )


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
