"""What rivals take out of the weights or shift into them (docs/method.md M3).

Low-rank branches of the weights alone, and per-channel factors that shift difficulty from
activations to weights.

Letters: T sampled tokens, N outputs, D channels, L directions kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from dirotq.errors import NumericalError
from dirotq.kernels.formats.protected import rounded_coefficients
from dirotq.kernels.transform_quantize import dequantize_rows, quantize_rows, transform
from dirotq.quantize.nearest import nearest
from dirotq.quantize.rotation import Rotation
from dirotq.quantize.spectrum import principal_basis

T = TypeVar("T")
FLOOR = 1e-4
"""Channels are taken for no quieter than this share of the loudest one."""


@dataclass(frozen=True)
class LowRank:
    """Directions of a branch, ascending: the last R columns are its best rank-R form.

    ``vectors``    P, [D, L] float64: c = x P
    ``duals``      [D, L] float64: V = W duals
    ``variances``  squared singular values, [L] float64; ``energy`` the sum of all
    """

    vectors: Tensor
    duals: Tensor
    variances: Tensor
    energy: float


def svd_branch(w_ND: Tensor, smooth_D: Tensor | None, leading: int | None) -> LowRank:
    """Return the best approximation of the smoothed weights W / m (SVDQuant, arXiv 2411.05007).

    w_ND      float, [N, D]
    smooth_D  m, [D]: the main branch reads x * m; None for ones
    """
    m_D = torch.ones_like(w_ND[0]) if smooth_D is None else smooth_D
    m_D1 = m_D.double()[:, None]
    smoothed = w_ND.double() / m_D1.mT
    gram_DD = smoothed.mT @ smoothed
    variances, v_DL = _leading(gram_DD, leading)
    return LowRank(v_DL * m_D1, v_DL / m_D1, variances, float(gram_DD.diagonal().sum()))


def weighted_branch(
    w_ND: Tensor, s_DD: Tensor, regularization: float, leading: int | None
) -> LowRank:
    """Return the branch of least output error: argmin_L E|x (W - L)ᵀ|² over rank-R L.

    With S + λ mean(diag S) I = C Cᵀ it is the truncated SVD of W C, times C⁻¹ (weighted
    Eckart-Young; SVD-LLM, arXiv 2403.07378, compresses by it).

    w_ND            float, [N, D]
    s_DD            second moment of x, [D, D]
    regularization  λ: 0 trusts S alone, large values tend to the plain SVD

    Raises NumericalError if the regularized moment can't be factored.
    """
    h_DD = s_DD.double().clone()
    h_DD.diagonal().add_(regularization * h_DD.diagonal().mean())
    c_DD, failed = torch.linalg.cholesky_ex(h_DD)
    if failed:
        raise NumericalError(
            f"the second moment is not positive definite with basis.regularization="
            f"{regularization:g}; raise it"
        )
    weighted = w_ND.double() @ c_DD
    gram_DD = weighted.mT @ weighted
    variances, v_DL = _leading(gram_DD, leading)
    vectors = torch.linalg.solve_triangular(c_DD.mT, v_DL, upper=True)
    return LowRank(vectors, c_DD @ v_DL, variances, float(gram_DD.diagonal().sum()))


def smoothing(absmax_D: Tensor, w_ND: Tensor, alpha: float) -> Tensor:
    """Return each channel's factor, float32 [D], geometric mean 1 (SmoothQuant, arXiv 2211.10438).

    absmax_D  largest magnitudes of the activation, [D]
    alpha   0 smooths nothing but levels the weights, 1 moves all of the activation's range

    x is multiplied by m = max|W|^(1 - α) / max|X|^α, the weights are divided by it.
    """
    weight_D = _floored(w_ND.abs().amax(0).float())
    log_D = (1 - alpha) * weight_D.log() - alpha * _floored(absmax_D.float()).log()
    return (log_D - log_D.mean()).exp()


def simulated(rotation: Rotation, w_ND: Tensor, x_TD: Tensor, *, clip: bool) -> Tensor:
    """Compute x Wᵀ with codes of nearest rounding on both sides: float32 [T, N].

    What a candidate is compared by before GPTQ: the packed linear's own arithmetic, without bias.
    """
    spec = rotation.spec
    main, kept = rotation.weights(w_ND)
    z, c = transform(x_TD, rotation.basis_DR, rotation.rotation_DK, spec, rotation.smooth_D)
    if spec.activations.bits < 16:
        z = dequantize_rows(*quantize_rows(z, spec))
    y = z @ nearest(main, spec, clip=clip, wp_NR=kept, bias_N=None).values().mT
    if c is None or kept is None:
        return y
    return y + (rounded_coefficients(c) if spec.branch.bits == 8 else c) @ kept.mT


def best(candidates: Iterable[tuple[Rotation, T]], w_ND: Tensor, x_TD: Tensor, *, clip: bool) -> T:
    """Return what comes with the rotation of the least output error on sampled rows."""
    want = x_TD @ w_ND.mT

    def error(candidate: tuple[Rotation, T]) -> float:
        return float((simulated(candidate[0], w_ND, x_TD, clip=clip) - want).square().sum())

    return min(candidates, key=error)[1]


def _leading(gram_DD: Tensor, leading: int | None) -> tuple[Tensor, Tensor]:
    """Return what :func:`principal_basis` does; of weights that are all zero any directions."""
    if bool((gram_DD == 0).all()):
        any_DL = torch.eye(len(gram_DD), dtype=torch.float64, device=gram_DD.device)
        any_DL = any_DL[:, -min(leading or len(gram_DD), len(gram_DD)) :]
        return any_DL.new_zeros(any_DL.shape[1]), any_DL
    return principal_basis(gram_DD, leading)


def _floored(absmax_D: Tensor) -> Tensor:
    return absmax_D.clamp_min(float(absmax_D.max()) * FLOOR).clamp_min(1e-20)
