"""Directions of least product: energy left in the input times energy left in the weights.

Docs/method.md M2, Eq. 15. Letters: D channels, N outputs, L directions kept, P of them chosen so
far, B directions iterated, Y that widen them, C of a step; M is 2: S and WᵀW.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from dirotq.kernels.full_float32 import full_float32
from dirotq.quantize.spectrum import principal_basis, refuse_indefinite, refuse_infinite

STEP = 8
"""Directions chosen at a time: the grid that ranks lie on."""
BLOCK = 3 * STEP
"""Directions iterated: those of a step, and those of two more, with which the first converge."""
ROUNDS = 2
"""Products with both matrices per step; twice as many where there is no step before."""
AHEAD = 0.1
"""Share of a step by which energies are extrapolated."""
NOTHING = 1e-9
"""Share of an energy that counts as none."""

_Both = Sequence[Sequence[Tensor]]
"""S and WᵀW, each as factors."""


def product_basis(s_DD: Tensor, w_ND: Tensor, leading: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the energy of x along each direction, [L], and directions, [D, L], both float64.

    s_DD     second moment of x, float32 [D, D]
    w_ND     weights of all linears that read x, float32 [N, D]
    leading  how many directions to return; None for all D

    The last r columns are the directions of rank r, for every multiple r of STEP: each step is
    sought beside those before it, whatever comes after. Energies are not sorted. Weights whose
    squares are zero in float32 make all directions alike: those of the inputs alone lead
    (:func:`principal_basis`). Products with S and W are in float32, as S itself is known:
    what is left of S below 1e-5 of its largest variance is rounding.

    Raises NumericalError if S is zero or has a negative variance, or S or WᵀW is not finite.
    """
    wanted = min(leading or len(s_DD), len(s_DD))
    refuse_infinite(s_DD, "the second moment")
    variances_D = s_DD.diagonal()
    refuse_indefinite(float(variances_D.min()), float(variances_D.max()), len(s_DD))
    with full_float32():
        squares_D = w_ND.square().sum(0)
        refuse_infinite(squares_D, "the weights' Gram matrix")
        if not bool(squares_D.amax() > 0):
            return principal_basis(s_DD, leading)
        # Fewer outputs than channels: two products with W are less than one with WᵀW.
        gram = (w_ND.mT, w_ND) if len(w_ND) < len(s_DD) else (w_ND.mT @ w_ND,)
        left_M = torch.stack([diag_D.double().sum() for diag_D in (variances_D, squares_D)])
        return _steps(((s_DD,), gram), left_M, wanted)


def _steps(both: _Both, left_M: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """Choose STEP directions at a time: energies of x [L] and directions [D, L], both float64.

    left_M  both energies, float64 [M]

    At a least product, directions lead the sum of both matrices, each over what is left of it: the
    gradient of the product's logarithm is zero. What is left is foretold from the step before, then
    found by repetition. There are several such places: the first step has two beginnings, and
    takes the better one. All is weighed by what would be left AHEAD of the step: the best
    eight directions alone are worse company for the next eight.
    """
    block, inputs_DC = _first(both)
    foretold = [left_M, _after(left_M, inputs_DC, _products(both, inputs_DC))]
    energies: list[Tensor] = []
    for start in range(0, wanted, STEP):
        count = min(STEP, wanted - start)
        for _ in range(ROUNDS if start else 2 * ROUNDS):
            block = block.widened(block.summed(1 / foretold[0]))
            turned = [block.turned(1 / weighing_M, BLOCK + count) for weighing_M in foretold]
            after = [_after(left_M, x.x_DB[:, -count:], x.of_MDB[..., -count:]) for x in turned]
            # Comparing waits for the device: the first round of all alone has two.
            best = int(torch.stack([x.log().sum() for x in after]).argmin()) if after[1:] else 0
            block, after_M = turned[best], after[best]
            foretold = [after_M * (after_M / left_M) ** AHEAD]
        foretold, left_M = [after_M * (after_M / left_M) ** (1 + AHEAD)], after_M
        energies.insert(0, (block.x_DB * block.of_MDB[0]).sum(0)[-count:])
        block = block.chosen(count)
    return torch.cat(energies).clamp_min(0), block.chosen_DP


@dataclass(frozen=True, slots=True)
class _Block:
    """Orthonormal directions beside the chosen ones, and both matrices' products with them.

    A block Krylov iteration with Rayleigh-Ritz that goes on from step to step. float64; the
    products are made in the matrices' own precision.
    """

    both: _Both
    chosen_DP: Tensor
    x_DB: Tensor
    of_MDB: Tensor

    def summed(self, weights_M: Tensor) -> Tensor:
        """Return products with the weighted sum of both matrices, [D, B]."""
        return torch.einsum("m,mdb->db", weights_M, self.of_MDB)

    def widened(self, y_DY: Tensor) -> Self:
        """Add directions that span y's, as many as there is room for."""
        beside_DA = torch.cat([self.chosen_DP, self.x_DB], 1)
        room = len(y_DY) - beside_DA.shape[1]
        if not room:
            return self
        new_DY = _beside(beside_DA, y_DY[:, -room:])
        return replace(
            self,
            x_DB=torch.cat([self.x_DB, new_DY], 1),
            of_MDB=torch.cat([self.of_MDB, _products(self.both, new_DY)], 2),
        )

    def turned(self, weights_M: Tensor, keep: int) -> Self:
        """Turn to the ``keep`` leading eigenvectors of the weighted sum among them, ascending.

        Where they are all that the chosen ones leave, all of them: no product brings them back.
        """
        turn_BB = torch.linalg.eigh(self.x_DB.mT @ self.summed(weights_M)).eigenvectors
        if self.chosen_DP.shape[1] + self.x_DB.shape[1] < len(self.x_DB):
            turn_BB = turn_BB[:, -keep:]
        return replace(self, x_DB=self.x_DB @ turn_BB, of_MDB=self.of_MDB @ turn_BB)

    def chosen(self, count: int) -> Self:
        """Choose the last ``count`` directions."""
        return replace(
            self,
            chosen_DP=torch.cat([self.x_DB[:, -count:], self.chosen_DP], 1),
            x_DB=self.x_DB[:, :-count],
            of_MDB=self.of_MDB[..., :-count],
        )


def _first(both: _Both) -> tuple[_Block, Tensor]:
    """Return a block of the leading directions of both, and the first STEP of S's, [D, C]."""
    dim, device = len(both[0][0]), both[0][0].device
    generator = torch.Generator(device="cpu").manual_seed(dim)
    start_DB = torch.randn(dim, min(BLOCK, dim), generator=generator, dtype=torch.float64)
    none_D0 = torch.zeros(dim, 0, dtype=torch.float64, device=device)
    empty = _Block(both, none_D0, none_D0, torch.stack([none_D0, none_D0]))
    leading = []
    for weights_M in torch.eye(2, dtype=torch.float64, device=device):
        block = empty.widened(start_DB.to(device))
        for _ in range(2 * ROUNDS):
            block = block.widened(block.summed(weights_M)).turned(weights_M, BLOCK)
        leading.append(block.x_DB[:, -BLOCK:])
    return empty.widened(torch.cat(leading[::-1], 1)), leading[0][:, -STEP:]


def _after(left_M: Tensor, x_DC: Tensor, of_MDC: Tensor) -> Tensor:
    """Return what directions leave of both energies, at least NOTHING of each, float64 [M].

    Where they hold all there is, only rounding would be left to divide by.
    """
    return torch.maximum(left_M - (x_DC * of_MDC).sum((1, 2)), NOTHING * left_M)


def _products(both: _Both, x_DB: Tensor) -> Tensor:
    """Return both matrices' products with x, float64 [M, D, B]."""
    found = []
    for factors in both:
        y_DB = x_DB.to(factors[-1].dtype)
        for factor in reversed(factors):
            y_DB = factor @ y_DB
        found.append(y_DB.double())
    return torch.stack(found)


def _beside(beside_DA: Tensor, y_DY: Tensor) -> Tensor:
    """Return orthonormal columns that span what of y is orthogonal to other ones, [D, Y].

    Two rounds of projection and Cholesky QR. Where y has too few dimensions, Householder's QR,
    which fills up with any directions.
    """
    q_DY = y_DY
    for _ in range(2):
        q_DY = q_DY / q_DY.norm(dim=0).clamp_min(1e-300)
        q_DY = q_DY - beside_DA @ (beside_DA.mT @ q_DY)
        lower_YY, failed = torch.linalg.cholesky_ex(q_DY.mT @ q_DY)
        if failed:
            return torch.linalg.qr(torch.cat([beside_DA, y_DY], 1)).Q[:, beside_DA.shape[1] :]
        q_DY = torch.linalg.solve_triangular(lower_YY, q_DY.mT, upper=False).mT
    return q_DY
