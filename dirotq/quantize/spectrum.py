"""Leading eigenvectors of a positive semi-definite matrix, on a CPU or a GPU.

Letters: D channels, L directions kept, B block of the subspace iteration.
"""

import torch
from torch import Tensor

from dirotq.errors import NumericalError

DENSE = 2048
"""Up to so many channels a full eigendecomposition is as fast as the iteration."""
MARGIN = 64
"""Directions iterated beyond the L wanted: they make the last of them converge."""
ROUNDS = 24
TOLERANCE = 1e-7
"""The iteration ends when the captured share of the energy grows by less than this in a round."""


def principal_basis(s_DD: Tensor, leading: int | None = None) -> tuple[Tensor, Tensor]:
    """Return λ [L] and eigenvectors [D, L] of S = U diag(λ) Uᵀ, float64 (docs/method.md Eq. 2).

    leading  how many of the largest to return; None for all D

    Ascending, as ``eigh`` returns them: the protected directions are the *last* columns. With many
    more channels than directions wanted, by subspace iteration (:func:`leading_basis`).

    Raises NumericalError if S is zero, not finite or not positive semi-definite.
    """
    dim = len(s_DD)
    refuse_infinite(s_DD, "the second moment")
    if leading is not None and dim > DENSE and leading + MARGIN < dim // 2:
        return leading_basis(s_DD, leading)
    variances_D, vectors_DD = torch.linalg.eigh(s_DD.double())
    low, high = float(variances_D[0]), float(variances_D[-1])
    refuse_indefinite(low, high, dim)
    kept = slice(dim - min(dim, leading or dim), None)
    return variances_D.clamp_min(0)[kept], vectors_DD[:, kept]


def leading_basis(s_DD: Tensor, leading: int) -> tuple[Tensor, Tensor]:
    """Compute the same by randomized subspace iteration with Rayleigh-Ritz (arXiv 0909.4061).

    Products with S are in S's own precision (float32), orthogonalization and the small
    eigenproblem in float64. Two products a round, so that an eigenvalue λ_i is separated from the
    first one left out by the fourth power of their ratio each round.

    Raises NumericalError if S is zero or has a negative variance.
    """
    generator = torch.Generator(device="cpu").manual_seed(len(s_DD))
    start = torch.randn(len(s_DD), leading + MARGIN, generator=generator)
    refuse_indefinite(float(s_DD.diagonal().min()), float(s_DD.diagonal().max()), len(s_DD))
    trace = float(s_DD.diagonal().double().sum())
    q_DB = _orthonormal(start.to(s_DD.device, torch.float64))
    captured = 0.0
    for _ in range(ROUNDS):
        q_DB = _orthonormal((s_DD @ q_DB.to(s_DD.dtype)).double())
        y_DB = (s_DD @ q_DB.to(s_DD.dtype)).double()
        small_BB = q_DB.mT @ y_DB
        variances_B, turn_BB = torch.linalg.eigh((small_BB + small_BB.mT) / 2)
        now = float(variances_B[-leading:].sum()) / trace
        if now - captured < TOLERANCE:
            break
        captured = now
        q_DB = _orthonormal(y_DB)
    refuse_indefinite(float(variances_B[-leading:].min()), float(variances_B[-1]), len(s_DD))
    return variances_B[-leading:].clamp_min(0), q_DB @ turn_BB[:, -leading:]


def _orthonormal(y_DB: Tensor) -> Tensor:
    """Orthonormal columns that span y's: two rounds of Cholesky QR, or Householder where it fails.

    float64; each round is a product and a triangular solve, many times faster than ``qr`` on a GPU.
    """
    q_DB = y_DB / y_DB.norm(dim=0).clamp_min(1e-300)
    for _ in range(2):
        lower_BB, failed = torch.linalg.cholesky_ex(q_DB.mT @ q_DB)
        if failed:
            return torch.linalg.qr(y_DB).Q
        q_DB = torch.linalg.solve_triangular(lower_BB, q_DB.mT, upper=False).mT
    return q_DB


def refuse_indefinite(low: float, high: float, dim: int) -> None:
    """Moments are float32 sums, each off by a rounding of the largest: D of them move an eigenvalue
    by as much as D roundings. Few calls leave many that should be zero."""
    if low < -dim * torch.finfo(torch.float32).eps * max(high, 0.0):
        raise NumericalError(
            f"the second moment is not positive semi-definite: eigenvalues {low:.3g} ... {high:.3g}"
        )
    if not high > 0:
        raise NumericalError(f"all activations are zero (largest variance {high:.3g})")


def refuse_infinite(matrix: Tensor, what: str) -> None:
    """Raise NumericalError if a matrix holds NaN or infinity."""
    low, high = matrix.aminmax()  # NaN comes out: one pass, and no mask in memory
    if not bool(low.isfinite() & high.isfinite()):
        raise NumericalError(
            f"{what} holds NaN or infinity ({float(low):.3g} ... {float(high):.3g}): nothing "
            "downstream can be right"
        )
