"""GPTQ (Frantar et al., arXiv 2210.17323) with act-order and static grids (docs/method.md M5).

Letters: N outputs (the stacked rows of all consumers of a site), K columns, G groups.
"""

import torch
from torch import Tensor

from ..quantize_weight import QMAX, codes_on_grid, dequantize_weight

BLOCK = 128
ESCALATIONS = 3
"""A failed Cholesky is retried with ten times the damping, at most this often."""


class FactorizationError(ArithmeticError):
    """The damped second moment could not be factored."""


def hessian_error(error_NK: Tensor, s_KK: Tensor) -> Tensor:
    """Row-wise e S eᵀ, [N]: the expected squared output error of each row."""
    return ((error_NK @ s_KK) * error_NK).sum(-1)


def gptq(
    w_NK: Tensor, s_KK: Tensor, scale_NG: Tensor, *, damping: float
) -> tuple[Tensor, dict[str, int]]:
    """Codes on the grid ``scale_NG``, column by column, each error passed on to later columns.

    w_NK      float32, [N, K]
    s_KK      float64, [K, K], the second moment of the linear's main-branch input; may be singular
    scale_NG  bf16, [N, G], K a multiple of G; fixed before the loop (static groups)
    damping   multiple of S's mean diagonal that is added to it; a direction that S does not see
              keeps its weight and is rounded like any other ("dead columns" are not zeroed)
    returns   int8 codes [N, K] in [-7, 7], and counts: ``escalations`` of the damping, and
              ``nearest`` rows that kept round-to-nearest because it was no worse in the metric S

    Raises FactorizationError after ESCALATIONS tenfold increases of the damping.
    """
    order = s_KK.diagonal().argsort(descending=True, stable=True)
    upper_KK, escalations = _inverse_factor(s_KK[order][:, order], damping)
    upper_KK = upper_KK.to(w_NK.dtype)
    step_NK = scale_NG.to(w_NK.dtype).repeat_interleave(w_NK.shape[1] // scale_NG.shape[1], 1)
    q_NK = _sweep(w_NK[:, order], step_NK[:, order], upper_KK)
    codes = torch.empty_like(q_NK)
    codes[:, order] = q_NK
    codes = codes.to(torch.int8)

    nearest = codes_on_grid(w_NK, scale_NG)
    s_w = s_KK.to(w_NK.dtype)
    ours = hessian_error(dequantize_weight(codes, scale_NG, w_NK.dtype) - w_NK, s_w)
    theirs = hessian_error(dequantize_weight(nearest, scale_NG, w_NK.dtype) - w_NK, s_w)
    keep_N = theirs <= ours
    codes[keep_N] = nearest[keep_N]
    return codes, {"escalations": escalations, "nearest": int(keep_N.sum())}


def _sweep(w_NK: Tensor, step_NK: Tensor, upper_KK: Tensor) -> Tensor:
    """Round columns left to right in lazy blocks; returns codes as floats."""
    w_NK = w_NK.clone()
    q_NK = torch.empty_like(w_NK)
    inverse_NK = torch.where(step_NK > 0, 1 / step_NK, 0.0)
    for start in range(0, w_NK.shape[1], BLOCK):
        stop = min(start + BLOCK, w_NK.shape[1])
        error_NB = torch.empty_like(w_NK[:, start:stop])
        for k in range(start, stop):
            q_N = (w_NK[:, k] * inverse_NK[:, k]).round().clamp(-QMAX, QMAX)
            error_N = (w_NK[:, k] - q_N * step_NK[:, k]) / upper_KK[k, k]
            w_NK[:, k + 1 : stop] -= torch.outer(error_N, upper_KK[k, k + 1 : stop])
            q_NK[:, k], error_NB[:, k - start] = q_N, error_N
        w_NK[:, stop:] -= error_NB @ upper_KK[start:stop, stop:]
    return q_NK


def _inverse_factor(s_KK: Tensor, damping: float) -> tuple[Tensor, int]:
    """Upper Cholesky factor U of (S + damp I)^-1 = UᵀU, float64, and how often damping grew."""
    mean = s_KK.diagonal().mean()
    eye = torch.eye(s_KK.shape[0], dtype=s_KK.dtype, device=s_KK.device)
    for escalation in range(ESCALATIONS + 1):
        lower, failed = torch.linalg.cholesky_ex(s_KK + damping * 10**escalation * mean * eye)
        if not failed:
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(inverse.isfinite().all()):
                return inverse, escalation
    raise FactorizationError(
        f"the second moment ({s_KK.shape[0]} channels, mean diagonal {mean:.3g}) is not positive "
        f"definite even with damping {damping * 10**ESCALATIONS:g}"
    )
