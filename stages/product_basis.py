"""Directions that leave the least product of input energy and weight energy (docs/method.md M2).

Stands in the place of ``basis`` (conf/basis): what it writes, every later stage reads alike.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

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
from dirotq.quantize.product_basis import product_basis
from dirotq.quantize.tensors import ahead, save_site
from dirotq.sources.model import DiffusersModel


@dataclass(frozen=True, kw_only=True)
class FitProductBasis:
    """Fit a basis per block site to its inputs and its weights (modulators have none).

    ``method``   only to refuse one that takes no directions out of the input
    ``leading``  directions to keep per site; None for all

    Writes ``sites/<site>.safetensors`` with ``vectors`` (float32 [D, L], the first chosen last),
    ``variances`` (float64 [L], of the input along each, unsorted) and ``energy`` (float64 [1], the
    sum of all D variances); an interrupted run goes on at the next site.

    Raises NumericalError naming the site.
    """

    version: ClassVar[str] = "1"
    resumable: ClassVar[bool] = True
    what: ClassVar[str] = "basis"
    needs = memory.product_basis

    model: DiffusersModel
    method: Method = untracked()  # noqa: RUF009 (a field without a default)
    leading: int | None
    device: str = untracked()

    def __post_init__(self) -> None:
        if self.leading is not None and self.leading < 1:
            raise ConfigError(f"basis.leading={self.leading}: use at least 1, or null for all")
        transform, branch = self.method.transform, self.method.branch
        if branch is None or branch.kind != "project" or transform.smooth:
            raise ConfigError(
                f"branch={branch and branch.kind}, transform.smooth={transform.smooth}: "
                "basis=product finds directions to project out of an input that is not smoothed; "
                "use it with branch=project and transform.smooth=false, as method=dirotq has them"
            )

    def run(self, out: Path, *, capture: Artifact) -> Mapping[str, float]:
        return in_units(self, out, {"capture": capture})

    def units(self, **_: Artifact) -> list[str]:
        return [site.name for site in self._sites()]

    def maker(self, out: Path, _: Sequence[str], *, capture: Artifact) -> Make:
        device = pick_device(self.device)
        captured, weights = Captured(capture), self.model.weights()
        sites = {site.name: site for site in self._sites()}

        def make(names: Iterable[str]) -> Iterator[Made]:
            for site, stored in ahead(captured.stored_moment, map(sites.__getitem__, names)):
                weight, _ = weights.stacked(site, device)
                s_DD = moment(stored, device)
                try:
                    variances, vectors = product_basis(s_DD, weight, self.leading)
                except NumericalError as error:
                    raise NumericalError(f"site {site.name}: {error}") from error
                energy = s_DD.diagonal().double().sum().reshape(1)
                found = {"vectors": vectors.float(), "variances": variances, "energy": energy}
                yield site.name, [save_site(out / "sites", site.name, found)]

        return make

    def merge(self, units: Units, **_: Artifact) -> Mapping[str, float]:
        return {"sites": len(self._sites())}

    def _sites(self) -> list[Site]:
        return [site for site in self.model.sites() if site.kind == "block"]
