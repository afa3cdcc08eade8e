"""Eigenbasis of each site's second moment."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import zarr
from torch import Tensor

from dirotq.device import pick_device
from dirotq.errors import NumericalError
from dirotq.models.source import DiffusersModel
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.stage import untracked
from dirotq.progress import track
from dirotq.tensors import read_array, save_site


def principal_basis(s_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Variances [D] and eigenvectors [D, D] of S = U diag(λ) Uᵀ, float64 (docs/method.md Eq. 2).

    Ascending, as ``eigh`` returns them: the protected directions are the *last* columns.

    Raises NumericalError if S is zero or not positive semi-definite.
    """
    variances_D, vectors_DD = torch.linalg.eigh(s_DD.double())
    low, high = float(variances_D[0]), float(variances_D[-1])
    if high <= 0:
        raise NumericalError(f"all activations are zero (largest variance {high:.3g})")
    if low < -1e-5 * high:
        raise NumericalError(
            f"the second moment is not positive semi-definite: eigenvalues {low:.3g} ... {high:.3g}"
        )
    return variances_D.clamp_min(0), vectors_DD


@dataclass(frozen=True, kw_only=True)
class FitBasis:
    """Fit a basis per block site (modulators have none).

    Writes ``sites/<site>.safetensors`` with ``vectors`` (float32 [D, D], ascending) and
    ``variances`` (float64 [D]).

    Raises NumericalError naming the site.
    """

    version: ClassVar[str] = "1"

    model: DiffusersModel
    device: str = untracked()

    def run(self, out: Path, *, capture: Artifact) -> Mapping[str, float]:
        device = pick_device(self.device)
        moments = zarr.open_group(capture.tree("moments.zarr"), mode="r")
        sites = [site for site in self.model.sites() if site.kind == "block"]
        deficient = 0
        for site in track(sites, "basis"):
            try:
                variances, vectors = principal_basis(read_array(moments, site.name).to(device))
            except NumericalError as error:
                raise NumericalError(f"site {site.name}: {error}") from error
            deficient += bool(variances[0] < 1e-9 * variances[-1])
            save_site(
                out / "sites", site.name, {"vectors": vectors.float(), "variances": variances}
            )
        return {"sites": len(sites), "rank_deficient": deficient}
