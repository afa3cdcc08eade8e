"""Low-rank branches that rivals take out of the weights alone (docs/method.md M3).

Letters: N outputs, D channels, L directions kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dirotq.errors import NumericalError
from dirotq.quantize.spectrum import principal_basis


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
    """The best approximation of the smoothed weights W / m (SVDQuant, arXiv 2411.05007).

    w_ND      float, [N, D]
    smooth_D  m, [D]: the main branch reads x * m; None for ones
    """
    m_D = torch.ones_like(w_ND[0]) if smooth_D is None else smooth_D
    m_D1 = m_D.double()[:, None]
    smoothed = w_ND.double() / m_D1.mT
    gram_DD = smoothed.mT @ smoothed
    variances, v_DL = principal_basis(gram_DD, leading)
    return LowRank(v_DL * m_D1, v_DL / m_D1, variances, float(gram_DD.diagonal().sum()))


def weighted_branch(
    w_ND: Tensor, s_DD: Tensor, regularization: float, leading: int | None
) -> LowRank:
    """The branch with the least output error: argmin_L E|x (W - L)ᵀ|² over rank-R L.

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
    variances, v_DL = principal_basis(gram_DD, leading)
    vectors = torch.linalg.solve_triangular(c_DD.mT, v_DL, upper=True)
    return LowRank(vectors, c_DD @ v_DL, variances, float(gram_DD.diagonal().sum()))
