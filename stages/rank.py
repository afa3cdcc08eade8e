"""How many directions each site protects: the plan."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from dirotq.cost import Cost, Machine
from dirotq.errors import ConfigError
from dirotq.models.family import Site
from dirotq.models.source import DiffusersModel
from dirotq.models.swap import effective_bits
from dirotq.models.workload import Workload
from dirotq.pipeline.artifact import Artifact
from dirotq.plan import Method, SitePlan, write_plan
from dirotq.tensors import load_site, site_file


@dataclass(frozen=True, kw_only=True)
class ChooseRank:
    """Choose r per block site, on the grid, once; every later stage only reads it.

    ``r``       the same rank everywhere, or null
    ``energy``  the smallest rank that holds this share of a site's variance, or null
    ``grid``    ranks are multiples of this (the kernels' granularity)

    Exactly one of ``r`` and ``energy`` is set. Writes ``plan.json``.

    Raises ConfigError for a rank off the grid or above a site's channels, or a method whose groups
    don't divide them; :meth:`check` does so before anything runs.
    """

    version: ClassVar[str] = "2"

    model: DiffusersModel
    method: Method
    r: int | None
    energy: float | None
    grid: int

    def __post_init__(self) -> None:
        if (self.r is None) == (self.energy is None):
            raise ConfigError(
                f"rank.r={self.r} and rank.energy={self.energy}: set exactly one of them and leave "
                "the other null"
            )
        if self.r is not None and (self.r < 0 or self.r % self.grid):
            raise ConfigError(
                f"rank.r={self.r} is not on the grid: use a multiple of {self.grid}, such as "
                f"{max(round(self.r / self.grid), 1) * self.grid}"
            )
        if self.energy is not None and not 0 <= self.energy < 1:
            raise ConfigError(f"rank.energy={self.energy} is no share: use 0 <= energy < 1")

    def check(self) -> None:
        """Everything about the plan that the shapes alone can refute."""
        for site in self.model.sites():
            self.method.spec(site, self.r if self._protects(site) and self.r else 0)
        leading = self.method.leading
        if leading is not None and self.r is not None and self.method.protect and self.r > leading:
            raise ConfigError(
                f"rank.r={self.r} exceeds method.leading={leading}, the eigenvectors that `basis` "
                f"keeps per site: set method.leading={self.r} too"
            )

    def run(self, out: Path, *, basis: Artifact) -> Mapping[str, float]:
        plan = []
        for site in self.model.sites():
            rank, why = 0, f"method {self.method.name} protects no direction"
            if site.kind == "modulator":
                why = "modulator: one row per image, so 16-bit activations cost nothing"
            elif self._protects(site):
                found = load_site(basis.file(f"sites/{site_file(site.name)}"))
                rank, why = self._rank(site, found["variances"], found["energy"])
            spec = self.method.spec(site, rank)
            if spec is not None:
                plan.append(
                    SitePlan(site, spec, self.method.rounding, self.method.weight_clip, why)
                )
        write_plan(out / "plan.json", plan)
        ranks = [entry.spec.rank for entry in plan if entry.site.kind == "block"]
        return {
            "mean_rank": sum(ranks) / max(len(ranks), 1),
            "bits_per_parameter": effective_bits(
                self.model.skeleton(), [(entry.site, entry.spec) for entry in plan]
            ),
        }

    def cost(self, work: Workload, machine: Machine) -> Cost:
        """Reads what ``basis`` kept per site."""
        kept = sum(4 * s.dim * min(self.method.leading or s.dim, s.dim) for s in work.block_sites)
        largest = 4 * work.widest * min(self.method.leading or work.widest, work.widest)
        return Cost(seconds=kept / machine.read, disk=800 * len(work.sites),
                    **machine.memory(0, largest))  # fmt: skip

    def _protects(self, site: Site) -> bool:
        return self.method.protect and site.kind == "block"

    def _rank(self, site: Site, variances_L: Tensor, energy: Tensor) -> tuple[int, str]:
        share_L = variances_L.flip(0).cumsum(0) / energy
        if self.r is not None:
            rank, mode = self.r, "fixed"
        else:
            assert self.energy is not None
            needed = int((share_L < self.energy).sum()) + 1
            rank, mode = min(-(-needed // self.grid) * self.grid, site.dim), "energy"
            if rank > len(share_L):
                raise ConfigError(
                    f"site {site.name}: the {len(share_L)} directions that `basis` kept hold "
                    f"{float(share_L[-1]):.1%} of the energy, rank.energy={self.energy:g} asks for "
                    f"more: raise method.leading (null keeps all {site.dim}) or ask for less"
                )
        held = float(share_L[rank - 1]) if rank else 0.0
        return rank, f"{mode}: {rank} of {site.dim} directions hold {held:.1%} of the energy"
