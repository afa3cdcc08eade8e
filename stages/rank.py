"""How many directions each site protects: the plan, by one rule for all sites."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from dirotq.device import pick_device
from dirotq.errors import ConfigError
from dirotq.models.call import load_probe
from dirotq.models.coverage import refuse_few
from dirotq.models.family import Site
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.stage import untracked
from dirotq.quantize import memory
from dirotq.quantize.measure import site_errors
from dirotq.quantize.plan import Method
from dirotq.quantize.planning import check_plan, make_plan, read_spectrum, refuse_rules
from dirotq.quantize.sensitive import check_sensitive, parse_sensitive
from dirotq.quantize.workload import Workload
from dirotq.sources.model import DiffusersModel


@dataclass(frozen=True, kw_only=True)
class ChooseRank:
    """Choose r per block site, on the grid, once; every later stage only reads it.

    ``r``         the same rank everywhere, or null
    ``fraction``  the multiple of the grid nearest to this share of a site's channels, or null
    ``energy``    the smallest rank that holds this share of a site's variance, or null
    ``grid``      ranks are multiples of this (the kernels' granularity)
    ``sensitive`` {count: k, keep: 16} or {count: k, act_bits: 8}: what the k sites do whose
                  quantization alone, at these ranks, disturbs the denoiser most; auto: 8-bit
                  activations where they gain enough (dirotq/quantize/sensitive.py); or null
    ``least_packed``  share of the blocks' parameters that sites must hold: a model of which less
                could be packed is refused

    Exactly one of ``r``, ``fraction`` and ``energy`` is set. Writes ``plan.json``, and
    ``kept.json`` with the sites that stay in 16 bits. Ranks under a budget: stages/rank_budget.py.

    Raises ConfigError for a rank off the grid or above a site's channels, a method whose groups
    don't divide them, or an override that fits no site; :meth:`check` does so before anything runs.
    """

    version: ClassVar[str] = "6"
    moved: ClassVar[Mapping[str, str]] = {"worst": "rank.sensitive={count: 3, act_bits: 8}"}
    needs = memory.rank

    model: DiffusersModel
    method: Method
    r: int | None
    fraction: float | None
    energy: float | None
    grid: int
    sensitive: str | Mapping[str, Any] | None
    least_packed: float = untracked()
    device: str = untracked()

    def __post_init__(self) -> None:
        rules = {name: getattr(self, name) for name in ("r", "fraction", "energy")}
        refuse_rules(rules, self.grid)
        if self.r is not None and (self.r < 0 or self.r % self.grid):
            raise ConfigError(
                f"rank.r={self.r} is not on the grid: use a multiple of {self.grid}, such as "
                f"{max(round(self.r / self.grid), 1) * self.grid}"
            )
        for name in ("fraction", "energy"):
            share = rules[name]
            if share is not None and not 0 <= share < 1:
                raise ConfigError(f"rank.{name}={share} is no share: use 0 <= {name} < 1")
        parse_sensitive(self.sensitive, self.method.activations.bits)

    def check(self) -> None:
        """Refuse, before anything runs, what the shapes alone can refute."""
        sites = self.model.sites()
        refuse_few(self.model.shapes(), sites, self.least_packed)
        ranks = self.expected(sites)
        check_plan(self.method, sites, self.grid, lambda site: ranks[site.name])
        check_sensitive(self.sensitive, self.method, sites)
        leading, most = self.method.leading, max(ranks.values())
        if leading is not None and self.method.branch is not None and most > leading:
            rule = f"rank.r={self.r}" if self.fraction is None else f"rank.fraction={self.fraction}"
            raise ConfigError(
                f"{rule} asks for {most} directions and exceeds method.leading={leading}, the "
                f"eigenvectors that `basis` keeps per site: set method.leading={most} too"
            )

    def run(self, out: Path, *, capture: Artifact, basis: Artifact) -> Mapping[str, float]:
        sites = self.model.sites()

        def choose(site: Site) -> tuple[int, str]:
            return self._rank(site, basis)

        method = self.method
        if asked := parse_sensitive(self.sensitive, method.activations.bits):
            probes, device = load_probe(capture), pick_device(self.device)

            def measure(
                methods: Sequence[Method], names: Collection[str]
            ) -> list[dict[str, float]]:
                plans = [make_plan(method, sites, choose).among(names) for method in methods]
                return site_errors(self.model, plans, basis, probes, device)

            blocks = [line.site.name for line in make_plan(method, sites, choose).blocks]
            added = asked.overrides(method, blocks, measure, Workload.alone(self))
            method = replace(method, overrides=[*method.overrides, *added])
        planned = make_plan(method, sites, choose)
        planned.write(out)
        return planned.metrics(self.model)

    def expected(self, sites: Sequence[Site]) -> Mapping[str, int]:
        """Return the rank of each block site, or where the energy decides, the most it may be."""
        return {site.name: self._expected(site) for site in sites if site.kind == "block"}

    def _expected(self, site: Site) -> int:
        if self.r is not None:
            return self.r
        if self.fraction is not None:
            return round(site.in_features * self.fraction / self.grid) * self.grid
        leading = self.method.leading
        return site.in_features // 4 if leading is None else min(leading, site.in_features)

    def _rank(self, site: Site, basis: Artifact) -> tuple[int, str]:
        spectrum = read_spectrum(basis, site)
        rank, mode = self._expected(site), "fixed" if self.fraction is None else "fraction"
        if self.energy is not None:
            share_L = spectrum.variances_L.cumsum(0) / spectrum.energy
            needed = int((share_L < self.energy).sum()) + 1
            rank, mode = min(-(-needed // self.grid) * self.grid, site.in_features), "energy"
            if rank > len(share_L):
                raise ConfigError(
                    f"site {site.name}: the {len(share_L)} directions that `basis` kept hold "
                    f"{float(share_L[-1]):.1%} of the energy, rank.energy={self.energy:g} asks for "
                    f"more: raise method.leading (null keeps all {site.in_features}) or ask for "
                    "less"
                )
        return rank, f"{mode}: {spectrum.told(rank, site)}"
