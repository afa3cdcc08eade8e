"""Directions that are projected out of each site's input."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from dirotq.device import pick_device
from dirotq.errors import ConfigError, NumericalError
from dirotq.models.family import Site
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.divided import Make, in_units
from dirotq.pipeline.stage import untracked
from dirotq.pipeline.units import Made, Units
from dirotq.quantize import memory
from dirotq.quantize.moments import Captured, moment
from dirotq.quantize.plan import Method
from dirotq.quantize.planning import refuse_fewer
from dirotq.quantize.product_basis import product_basis
from dirotq.quantize.spectrum import principal_basis
from dirotq.quantize.tensors import ahead, load_site, save_site, site_file
from dirotq.sources.model import DiffusersModel

Directions = Literal["principal", "product"]


@dataclass(frozen=True, kw_only=True)
class FitBasis:
    """Fit a basis per block site (modulators have none).

    ``method``      only to refuse one that needs another basis
    ``directions``  ``principal``: leading eigenvectors of the second moment (docs/method.md Eq. 1),
                    or ``product``: those that leave the least product of input energy and weight
                    energy (Eq. 15)
    ``leading``     directions to keep per site; None for all (the dense rotation needs them)

    Writes ``sites/<site>.safetensors`` with ``vectors`` (float32 [D, L], the first chosen last),
    ``variances`` (float64 [L], of the input along each: ascending where they are principal) and
    ``energy`` (float64 [1], the sum of all D variances); an interrupted run goes on at the next
    site.

    Raises NumericalError naming the site.
    """

    version: ClassVar[str] = "4"
    resumable: ClassVar[bool] = True
    what: ClassVar[str] = "basis"
    needs = memory.basis

    model: DiffusersModel
    method: Method = untracked()  # noqa: RUF009 (a field without a default)
    directions: Directions
    leading: int | None
    device: str = untracked()

    def __post_init__(self) -> None:
        if self.leading is not None and self.leading < 1:
            raise ConfigError(f"basis.leading={self.leading}: use at least 1, or null for all")
        refuse_fewer(self.leading, self.method)
        smooth, branch = self.method.transform.smooth, self.method.branch
        if smooth or (branch is not None and branch.kind == "beside"):
            raise ConfigError(
                f"transform.smooth={smooth}, branch={branch and branch.kind}: this "
                "basis has neither factors nor branches beside the input; use basis=svd, weighted "
                "or smooth, as method=svdquant, absorb and smoothquant do"
            )

    def run(self, out: Path, *, capture: Artifact) -> Mapping[str, float]:
        return in_units(self, out, {"capture": capture})

    def units(self, **_: Artifact) -> list[str]:
        return [site.name for site in self._sites()]

    def maker(self, out: Path, _: Sequence[str], *, capture: Artifact) -> Make:
        device, captured = pick_device(self.device), Captured(capture)
        sites = {site.name: site for site in self._sites()}
        weights = self.model.weights() if self.directions == "product" else None

        def read(site: Site) -> tuple[Any, Tensor | None]:
            weight = None if weights is None else weights.stacked(site, device)[0]
            return captured.moment_on(site, device), weight

        def make(names: Iterable[str]) -> Iterator[Made]:
            for site, (stored, w_ND) in ahead(read, map(sites.__getitem__, names), device):
                s_DD = moment(stored, device)
                try:
                    if w_ND is None:
                        variances, vectors = principal_basis(s_DD, self.leading)
                    else:
                        variances, vectors = product_basis(s_DD, w_ND, self.leading)
                except NumericalError as error:
                    raise NumericalError(f"site {site.name}: {error}") from error
                energy = s_DD.diagonal().double().sum().reshape(1)
                found = {"vectors": vectors.float(), "variances": variances, "energy": energy}
                yield site.name, [save_site(out / "sites", site.name, found)]

        return make

    def merge(self, units: Units, **_: Artifact) -> Mapping[str, float]:
        sites = self._sites()
        return {"sites": len(sites), "rank_deficient": _deficient(units.out, sites)}

    def _sites(self) -> list[Site]:
        return [site for site in self.model.sites() if site.kind == "block"]


def _deficient(out: Path, sites: list[Site]) -> int:
    """Count sites whose kept directions hold all there is, though they are not all directions.

    Sites with a variance of zero count too.
    """
    count = 0
    for site in sites:
        found = load_site(out / "sites" / site_file(site.name))
        variances, energy = found["variances"], float(found["energy"])
        few = len(variances) < site.in_features
        all_held = few and float(variances.sum()) > (1 - 1e-9) * energy
        count += all_held or bool(variances.min() < 1e-9 * variances.max())
    return count
