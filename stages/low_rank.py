"""Bases of the rival methods: low-rank branches of the weights, and smoothing factors.

Stands in the place of ``basis`` (conf/basis): what it writes, every later stage reads alike.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
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
from dirotq.quantize.rivals import best, smoothing, svd_branch, weighted_branch
from dirotq.quantize.rotation import Rotation
from dirotq.quantize.spectrum import principal_basis
from dirotq.quantize.tensors import ahead, load_site, save_site, site_file
from dirotq.sources.model import DiffusersModel


@dataclass(frozen=True, kw_only=True)
class FitLowRank:
    """Fit a branch beside the whole input, and smoothing factors, per block site.

    ``branch``          ``svd`` (of the smoothed weights), ``weighted`` (least output error) or
                        ``none``
    ``regularization``  of ``weighted``: share of the mean diagonal added to the second moment
    ``smoothing``       ``none``, ``fixed`` (``alpha``) or ``grid``: of ``candidates`` equally
                        spaced strengths up to 1, or none at all, the one whose quantized site errs
                        least on the sampled rows
    ``rank``            of the branch while candidates are compared: the plan's
    ``leading``         directions to keep per site; None for all

    Writes ``sites/<site>.safetensors`` with ``vectors`` and ``duals`` (float32 [D, L], ascending),
    ``variances`` (float64 [L]), ``energy`` (float64 [1]), ``smooth`` (float32 [D]) and ``alpha``
    (float64 [1]; -1 for none); what a method lacks is absent, but without a branch ``variances``
    are those of the activation. An interrupted run goes on at the next site.

    Raises NumericalError naming the site.
    """

    version: ClassVar[str] = "1"
    resumable: ClassVar[bool] = True
    what: ClassVar[str] = "basis"
    needs = memory.low_rank

    model: DiffusersModel
    method: Method
    branch: Literal["none", "svd", "weighted"]
    regularization: float
    smoothing: Literal["none", "fixed", "grid"]
    alpha: float
    candidates: int
    rank: int | None
    leading: int | None
    device: str = untracked()

    def __post_init__(self) -> None:
        if self.branch not in ("none", "svd", "weighted"):
            raise ConfigError(f"basis.branch={self.branch!r}: use 'none', 'svd' or 'weighted'")
        if self.smoothing not in ("none", "fixed", "grid"):
            raise ConfigError(f"basis.smoothing={self.smoothing!r}: use 'none', 'fixed' or 'grid'")
        if not 0 <= self.alpha <= 1 or self.candidates < 1 or self.regularization < 0:
            raise ConfigError(
                f"basis.alpha={self.alpha}, candidates={self.candidates}, regularization="
                f"{self.regularization}: use 0 ... 1, at least 1, and 0 or more"
            )
        if self.smoothing == "grid" and self.rank is None:
            raise ConfigError(
                "basis.smoothing=grid compares candidates at the rank they will have, but rank.r "
                "is null: fix it (rank.r=16), or set basis.rank"
            )
        if self.smoothing != "none" and self.branch == "weighted":
            raise ConfigError("basis.branch=weighted takes basis.smoothing=none")
        refuse_fewer(self.leading, self.method)
        branch = self.method.branch
        beside = branch is not None and branch.kind == "beside"
        if beside != (self.branch != "none"):
            raise ConfigError(
                f"branch={branch and branch.kind} and basis.branch={self.branch}: a branch beside "
                "the input needs basis.branch=svd or weighted, and no other method has a use for "
                "one"
            )
        smooth = self.method.transform.smooth
        if smooth != (self.smoothing != "none"):
            raise ConfigError(
                f"transform.smooth={smooth} and basis.smoothing={self.smoothing}: a "
                "method that smooths needs factors, and one that doesn't has no use for them"
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
                absmax_D = captured.absmax(site).to(device)
                x_TD = captured.rows(site).to(device, torch.float32)
                s_DD = moment(stored, device)
                try:
                    found = fit_site(self, site, weight, s_DD, absmax_D, x_TD)
                    if "variances" not in found:
                        found["variances"], _ = principal_basis(s_DD, self.leading)
                        found["energy"] = s_DD.diagonal().double().sum().reshape(1)
                except NumericalError as error:
                    raise NumericalError(f"site {site.name}: {error}") from error
                yield site.name, [save_site(out / "sites", site.name, found)]

        return make

    def merge(self, units: Units, **_: Artifact) -> Mapping[str, float]:
        sites = self._sites()
        files = [units.out / "sites" / site_file(site.name) for site in sites]
        chosen = [load_site(file).get("alpha") for file in files]
        alphas = [float(a) for a in chosen if a is not None]
        return {"sites": len(sites)} | ({"mean_alpha": sum(alphas) / len(alphas)} if alphas else {})

    def _sites(self) -> list[Site]:
        return [site for site in self.model.sites() if site.kind == "block"]


def fit_site(
    stage: FitLowRank, site: Site, w_ND: Tensor, s_DD: Tensor, absmax_D: Tensor, x_TD: Tensor
) -> dict[str, Tensor]:
    """Return what is stored of one site, but for the spectrum of one without a branch.

    w_ND      float32 [N, D], stacked weights
    s_DD      float32 [D, D], second moment
    absmax_D  float32 [D], largest magnitude of each channel
    x_TD      float32 [T, D], sampled rows
    """

    def smoothed(alpha: float | None) -> dict[str, Tensor]:
        smooth_D = torch.ones_like(w_ND[0])
        if alpha is not None:  # as the packed linear holds it
            smooth_D = smoothing(absmax_D, w_ND, alpha).to(torch.bfloat16).float()
        strength = torch.tensor([-1.0 if alpha is None else alpha]).double()
        branch = _branch(stage, w_ND, s_DD, smooth_D)
        return branch | {"smooth": smooth_D, "alpha": strength}

    if stage.smoothing == "fixed":
        return smoothed(stage.alpha)
    spec = stage.method.spec(site, stage.rank or 0) if stage.smoothing == "grid" else None
    if spec is None:  # no smoothing, or an override leaves the site in 16 bits
        return _branch(stage, w_ND, s_DD, None)
    strengths = (None, *(k / stage.candidates for k in range(1, stage.candidates + 1)))
    tried = ((Rotation.cut(found, spec), found) for found in map(smoothed, strengths))
    return best(tried, w_ND, x_TD, clip=stage.method.weight_clip)


def _branch(
    stage: FitLowRank, w_ND: Tensor, s_DD: Tensor, smooth_D: Tensor | None
) -> dict[str, Tensor]:
    if stage.branch == "none":
        return {}
    if stage.branch == "svd":
        found = svd_branch(w_ND, smooth_D, stage.leading)
    else:
        found = weighted_branch(w_ND, s_DD, stage.regularization, stage.leading)
    return {
        "vectors": found.vectors.float(),
        "duals": found.duals.float(),
        "variances": found.variances,
        "energy": torch.tensor([found.energy]).double(),
    }
