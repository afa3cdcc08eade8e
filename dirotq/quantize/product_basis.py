"""Directions of least product: energy left in the input times energy left in the weights.

Docs/method.md M2, Eq. 15. Letters: D channels, N outputs, L directions kept, Q candidates, F of
them free, B directions of a step.
"""

import torch
from torch import Tensor

from dirotq.kernels.full_float32 import full_float32
from dirotq.quantize.spectrum import principal_basis, refuse_infinite

STEP = 8
"""Directions chosen at a time: the grid that ranks lie on."""
ROUNDS = 2
"""Each step weighs both energies by what it leaves of them: found by repetition. Two rounds leave
0.003 % more of the product than ten do."""

NOTHING = 1e-9
"""Share of an energy that counts as none."""


def product_basis(s_DD: Tensor, w_ND: Tensor, leading: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the energy of x along each direction, [L], and directions, [D, L], both float64.

    s_DD     second moment of x, float32 [D, D]
    w_ND     weights of all linears that read x, float32 [N, D]
    leading  how many directions to return; None for all D

    The last r columns are the directions of rank r, for every multiple r of STEP: each step is the
    best beside those before it. Steps are sought among the leading directions of S and of WᵀW
    together. Energies are not sorted. Weights whose squares are zero in float32 make all directions
    alike: those of the inputs alone lead (:func:`principal_basis`).

    Raises NumericalError if S is zero or not positive semi-definite, or S or WᵀW is not finite.
    """
    dim = len(s_DD)
    wanted = min(leading or dim, dim)
    with full_float32():
        gram_DD = w_ND.mT @ w_ND
        refuse_infinite(gram_DD, "the weights' Gram matrix")
        if not bool(gram_DD.diagonal().amax() > 0):
            return principal_basis(s_DD, leading)
        q_DQ = _candidates(s_DD, gram_DD, wanted)
        s_QQ, gram_QQ = (_within(matrix, q_DQ) for matrix in (s_DD, gram_DD))
    left = s_DD.diagonal().double().sum(), gram_DD.diagonal().double().sum()
    free_QF = torch.eye(len(s_QQ), dtype=s_QQ.dtype, device=s_QQ.device)
    chosen: list[Tensor] = []
    for start in range(0, wanted, STEP):
        both = free_QF.mT @ s_QQ @ free_QF, free_QF.mT @ gram_QQ @ free_QF
        turn_FF, left = _step(both, left, min(STEP, wanted - start))
        turned_QF = free_QF @ turn_FF
        free_QF, best_QB = turned_QF[:, :-STEP], turned_QF[:, -STEP:]
        chosen.insert(0, best_QB)
    vectors_QL = torch.cat(chosen, 1)[:, -wanted:]
    return ((s_QQ @ vectors_QL) * vectors_QL).sum(0).clamp_min(0), q_DQ @ vectors_QL


def _candidates(s_DD: Tensor, gram_DD: Tensor, wanted: int) -> Tensor:
    """Return an orthonormal basis of the leading directions of both, float64 [D, Q]."""
    _, of_inputs = principal_basis(s_DD, wanted)
    if 2 * wanted >= len(s_DD):
        return torch.eye(len(s_DD), dtype=of_inputs.dtype, device=s_DD.device)
    _, of_weights = principal_basis(gram_DD, wanted)
    return torch.linalg.qr(torch.cat([of_inputs, of_weights], 1)).Q


def _step(
    both: tuple[Tensor, Tensor], left: tuple[Tensor, Tensor], count: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return a rotation [F, F] whose last ``count`` columns are best, and what they leave of both.

    At a least product, directions lead the sum of both matrices, each over what is left of it: the
    gradient of the product's logarithm is zero. The logarithm is concave, so repeating this never
    raises the product, but there are several such places: the better of two beginnings is taken.
    """
    found = []
    for weights in ((1 / left[0], 1 / left[1]), (1 / left[0], 0 / left[1])):
        for _ in range(ROUNDS):
            turn_FF = torch.linalg.eigh(weights[0] * both[0] + weights[1] * both[1]).eigenvectors
            best_FB = turn_FF[:, -count:]
            held = [(best_FB * (matrix @ best_FB)).sum() for matrix in both]
            # Where the directions hold all there is, only rounding would be left to divide by.
            s_left, gram_left = (
                torch.maximum(energy - of_best, NOTHING * energy)
                for energy, of_best in zip(left, held, strict=True)
            )
            weights = 1 / s_left, 1 / gram_left
        found.append((float(s_left.log() + gram_left.log()), turn_FF, (s_left, gram_left)))
    _, turn_FF, after = min(found, key=lambda one: one[0])
    return turn_FF, after


def _within(matrix_DD: Tensor, q_DQ: Tensor) -> Tensor:
    """Return QᵀMQ, float64 [Q, Q]: the product with D columns in M's own precision."""
    return q_DQ.mT @ (matrix_DD @ q_DQ.to(matrix_DD.dtype)).double()
