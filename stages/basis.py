"""Leading eigenvectors of each site's second moment.

Letters: D channels, L directions kept, B block of the subspace iteration.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import zarr
from torch import Tensor

from dirotq.ahead import ahead
from dirotq.cost import Cost, Machine
from dirotq.device import pick_device
from dirotq.errors import ConfigError, NumericalError
from dirotq.models.family import Site
from dirotq.models.source import DiffusersModel
from dirotq.models.workload import Workload
from dirotq.moments import moment, read_stored
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.stage import untracked
from dirotq.progress import track
from dirotq.tensors import load_site, save_site, site_file

DENSE = 2048
"""Up to so many channels a full eigendecomposition is as fast as the iteration."""
MARGIN = 64
"""Directions iterated beyond the L wanted: they make the last of them converge."""
ROUNDS = 24
TOLERANCE = 1e-7
"""The iteration ends when the captured share of the energy grows by less than this in a round."""


def principal_basis(s_DD: Tensor, leading: int | None = None) -> tuple[Tensor, Tensor]:
    """Variances [L] and eigenvectors [D, L] of S = U diag(λ) Uᵀ, float64 (docs/method.md Eq. 2).

    leading  how many of the largest to return; None for all D

    Ascending, as ``eigh`` returns them: the protected directions are the *last* columns. With many
    more channels than directions wanted, by subspace iteration (:func:`leading_basis`).

    Raises NumericalError if S is zero or not positive semi-definite.
    """
    dim = len(s_DD)
    if leading is not None and dim > DENSE and leading + MARGIN < dim // 2:
        return leading_basis(s_DD, leading)
    variances_D, vectors_DD = torch.linalg.eigh(s_DD.double())
    low, high = float(variances_D[0]), float(variances_D[-1])
    _refuse_indefinite(low, high)
    kept = slice(dim - min(dim, leading or dim), None)
    return variances_D.clamp_min(0)[kept], vectors_DD[:, kept]


def leading_basis(s_DD: Tensor, leading: int) -> tuple[Tensor, Tensor]:
    """The same from randomized subspace iteration with Rayleigh-Ritz (arXiv 0909.4061).

    Products with S are in S's own precision (float32), orthogonalization and the small
    eigenproblem in float64. Two products a round, so that an eigenvalue λ_i is separated from the
    first one left out by the fourth power of their ratio each round.

    Raises NumericalError if S is zero or has a negative variance.
    """
    generator = torch.Generator(device="cpu").manual_seed(len(s_DD))
    start = torch.randn(len(s_DD), leading + MARGIN, generator=generator)
    _refuse_indefinite(float(s_DD.diagonal().min()), float(s_DD.diagonal().max()))
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
    _refuse_indefinite(float(variances_B[-leading:].min()), float(variances_B[-1]))
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


def _refuse_indefinite(low: float, high: float) -> None:
    if not high > 0:
        raise NumericalError(f"all activations are zero (largest variance {high:.3g})")
    if low < -1e-5 * high:
        raise NumericalError(
            f"the second moment is not positive semi-definite: eigenvalues {low:.3g} ... {high:.3g}"
        )


@dataclass(frozen=True, kw_only=True)
class FitBasis:
    """Fit a basis per block site (modulators have none).

    ``leading``  directions to keep per site; None for all (the dense rotation needs them)

    Writes ``sites/<site>.safetensors`` with ``vectors`` (float32 [D, L], ascending), ``variances``
    (float64 [L]) and ``energy`` (float64 [1], the sum of all D variances); an interrupted run goes
    on at the next site.

    Raises NumericalError naming the site.
    """

    version: ClassVar[str] = "2"
    resumable: ClassVar[bool] = True

    model: DiffusersModel
    leading: int | None
    device: str = untracked()

    def __post_init__(self) -> None:
        if self.leading is not None and self.leading < 1:
            raise ConfigError(f"basis.leading={self.leading}: use at least 1, or null for all")

    def run(self, out: Path, *, capture: Artifact) -> Mapping[str, float]:
        device = pick_device(self.device)
        moments = zarr.open_group(capture.tree("moments.zarr"), mode="r")
        sites = [site for site in self.model.sites() if site.kind == "block"]
        todo = [s for s in sites if not (out / "sites" / site_file(s.name)).exists()]
        for site, stored in track(
            ahead(lambda site: read_stored(moments, site.name), todo), "basis", total=len(todo)
        ):
            s_DD = moment(stored, device)
            try:
                variances, vectors = principal_basis(s_DD, self.leading)
            except NumericalError as error:
                raise NumericalError(f"site {site.name}: {error}") from error
            energy = s_DD.diagonal().double().sum().reshape(1)
            found = {"vectors": vectors.float(), "variances": variances, "energy": energy}
            save_site(out / "sites", site.name, found)
        return {"sites": len(sites), "rank_deficient": self._deficient(out, sites)}

    def cost(self, work: Workload, machine: Machine) -> Cost:
        """Per site its moments from disk, then an iteration, or all eigenvectors of small ones."""
        seconds = 0.0
        for site in work.block_sites:
            dim, kept = site.dim, min(self.leading or site.dim, site.dim)
            seconds += machine.site + work.moment_bytes(site) / machine.read
            if kept < dim and dim > DENSE:
                width = kept + MARGIN
                products = 4 * dim**2 * width / machine.float32
                thin = 12 * dim * width**2 / machine.float64
                usual = ROUNDS / 3  # rounds until the iteration stands still
                seconds += usual * (products + thin + 5 * machine.factor)
            else:
                seconds += 9 * dim**3 / machine.eigh
        widest = work.widest
        dense = self.leading is None or widest <= DENSE
        matrices = (8 * 5 if dense else 4 * 4) * widest**2
        thin = 6 * 8 * widest * ((self.leading or widest) + MARGIN)
        disk = sum(4 * s.dim * min(self.leading or s.dim, s.dim) for s in work.block_sites)
        largest = max(work.moment_bytes(site) for site in work.block_sites)
        return Cost(
            seconds=seconds,
            disk=disk,
            lower="method.leading=64 (the rank needs no more)",
            **machine.memory(matrices + thin, 2 * largest),
        )

    def _deficient(self, out: Path, sites: list[Site]) -> int:
        """Sites whose kept directions hold all there is, though they are not all directions, and
        sites with a variance of zero."""
        count = 0
        for site in sites:
            found = load_site(out / "sites" / site_file(site.name))
            variances, energy = found["variances"], float(found["energy"])
            all_held = len(variances) < site.dim and float(variances.sum()) > (1 - 1e-9) * energy
            count += all_held or bool(variances[0] < 1e-9 * variances[-1])
        return count
