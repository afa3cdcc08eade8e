"""How many directions each site protects: the plan, by water-filling under a budget."""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from dirotq.device import pick_device
from dirotq.errors import ConfigError
from dirotq.evaluate.statistics import difference_interval
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.models.call import load_probe
from dirotq.models.coverage import refuse_few
from dirotq.models.family import Site
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.stage import untracked
from dirotq.quantize import memory
from dirotq.quantize.budget import Prices, in_bits, in_forwards, refuse_unpriced, water_fill
from dirotq.quantize.measure import plans_psnr, site_errors
from dirotq.quantize.plan import Method, SitePlan
from dirotq.quantize.planning import (
    Planned,
    Spectrum,
    check_plan,
    largest_rank,
    make_plan,
    read_spectrum,
    refuse_rules,
)
from dirotq.quantize.sensitive import check_sensitive, parse_sensitive
from dirotq.quantize.workload import Workload
from dirotq.sources.model import DiffusersModel
from dirotq.sources.prompts import PromptSet

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AllocateRank:
    """Spend a budget on directions where they remove most predicted error (docs/method.md M6).

    ``bits``         bits per parameter to stay within, everything counted; or null
    ``like``         the bits that this rank takes if every site has it; or null
    ``overhead``     predicted FLOPs of the low-rank branches as a share of a 16-bit forward's; or
                     null
    ``grid``         ranks are multiples of this (the kernels' granularity)
    ``gate``         calibration prompts whose images decide between this plan and the uniform
                     rank of the same budget; 0 leaves the comparison out
    ``prompts``      where they come from; ``batch`` of them per pipeline call
    ``sensitive``    as in stages/rank.py, measured at that uniform rank
    ``least_packed`` as there

    Exactly one of ``bits``, ``like`` and ``overhead`` is set. Writes ``plan.json``, ``kept.json``
    and ``allocation.json`` (per site: rank, sensitivity, energy left, at both plans).

    Raises ConfigError for a budget that can't be met or can't be spent, or a method whose low-rank
    branch does not project; :meth:`check` does so before anything runs.
    """

    version: ClassVar[str] = "4"
    moved: ClassVar[Mapping[str, str]] = {"worst": "rank.sensitive={count: 3, act_bits: 8}"}
    needs = memory.rank_budget

    model: DiffusersModel
    method: Method
    prompts: PromptSet
    bits: float | None
    like: int | None
    overhead: float | None
    grid: int
    gate: int
    batch: int
    sensitive: str | Mapping[str, Any] | None
    least_packed: float = untracked()
    device: str = untracked()
    sensitivity: str = field(init=False, default="measured")
    """Another option lost 0.3 to 0.4 dB and is gone (docs/quality.md): a constant of the recipe."""

    def __post_init__(self) -> None:
        refuse_rules(
            {name: getattr(self, name) for name in ("bits", "like", "overhead")}, self.grid
        )
        if self.like is not None and (self.like < 0 or self.like % self.grid):
            raise ConfigError(
                f"rank.like={self.like} is not on the grid: use a multiple of {self.grid}"
            )
        if self.gate < 0 or self.batch < 1:
            raise ConfigError(
                f"rank.gate={self.gate}, rank.batch={self.batch}: use at least 0 and 1"
            )
        parse_sensitive(self.sensitive, self.method.activations.bits)
        refuse_unpriced(self.method)

    def check(self) -> None:
        """Refuse, before anything runs, what shapes and prompts can refute."""
        sites = self.model.sites()
        refuse_few(self.model.shapes(), sites, self.least_packed)
        check_plan(self.method, sites, self.grid, lambda s: largest_rank(self.method, s, self.grid))
        check_sensitive(self.sensitive, self.method, sites)
        leading = self.method.leading
        if leading is not None and (self.like or 0) > leading:
            raise ConfigError(
                f"rank.like={self.like} exceeds method.leading={leading}, the eigenvectors that "
                f"`basis` keeps per site: set method.leading={self.like} or more"
            )
        self._budget(self.method, sites)
        if self.gate > (there := self.prompts.count):
            raise ConfigError(
                f"rank.gate={self.gate} asks for more prompts than calibrate ({there}): use less, "
                "or raise prompts.calibration.count"
            )

    def run(self, out: Path, *, capture: Artifact, basis: Artifact) -> Mapping[str, float]:
        device, method, sites = pick_device(self.device), self.method, self.model.sites()
        spectra = {s.name: read_spectrum(basis, s) for s in sites if s.kind == "block"}
        probes = load_probe(capture)

        def plan_of(method: Method, ranks: Mapping[str, int], mode: str) -> Planned:
            def choose(site: Site) -> tuple[int, str]:
                rank = ranks[site.name]
                return rank, f"{mode}: {spectra[site.name].told(rank, site)}"

            return make_plan(method, sites, choose)

        def uniform_plan(method: Method) -> Planned:
            prices, limit = self._budget(method, sites)
            rank = prices.largest_uniform(limit, self.grid)
            return plan_of(method, prices.uniform(rank), "uniform")

        measured: dict[tuple[str, QuantSpec], float] = {}

        def estimate(plans: Sequence[Sequence[SitePlan]]) -> list[dict[str, float]]:
            found = site_errors(self.model, plans, basis, probes, device)
            for plan, errors in zip(plans, found, strict=True):
                measured.update({(e.site.name, e.spec): errors[e.site.name] for e in plan})
            return found

        def measure(methods: Sequence[Method], names: Collection[str]) -> list[dict[str, float]]:
            return estimate([uniform_plan(method).among(names) for method in methods])

        if asked := parse_sensitive(self.sensitive, method.activations.bits):
            added = asked.overrides(method, set(spectra), measure, Workload.alone(self))
            method = replace(method, overrides=[*method.overrides, *added])
        prices, limit = self._budget(method, sites)
        uniform = uniform_plan(method)
        # All if nothing was asked for, or if what was chosen leaves another rank.
        if new := [e for e in uniform.blocks if (e.site.name, e.spec) not in measured]:
            estimate([new])
        errors = {e.site.name: measured[e.site.name, e.spec] for e in uniform.blocks}
        ranks_before = {line.site.name: line.spec.rank for line in uniform.blocks}
        gains = {
            name: _sensitivity(spectra[name], ranks_before[name], errors[name])
            for name in prices.each
        }
        ranks = self._bought(gains, spectra, prices, limit)
        rows: list[dict[str, Any]] = [
            {
                "site": name,
                "rank": ranks[name],
                "uniform_rank": ranks_before[name],
                "sensitivity": gain,
                "error_alone": errors[name],
                "predicted_error": gain * spectra[name].tail(ranks[name]),
                "predicted_error_uniform": gain * spectra[name].tail(ranks_before[name]),
            }
            for name, gain in gains.items()
        ]
        (out / "allocation.json").write_text(json.dumps(rows, indent=1) + "\n")
        before = sum(row["predicted_error_uniform"] for row in rows)
        after = sum(row["predicted_error"] for row in rows)
        # How many dB of error are predicted to go; 0 where there is none.
        ratio = torch.tensor([before, after], dtype=torch.float64).clamp_min(1e-300)
        metrics = {
            "uniform_rank": max(prices.uniform(prices.largest_uniform(limit, self.grid)).values()),
            "budget_spent": prices.total(ranks) / limit,
            "predicted_gain_db": float(10 * (ratio[0] / ratio[1]).log10()),
        }
        if after < before:
            budgeted = plan_of(method, ranks, "budget")
            planned, judged = self._gated(budgeted, uniform, basis, device)
        else:  # steps are coarse: what was too dear at the end can outweigh what was gained
            log.warning("rank: fell back to the uniform rank: no gain is predicted for the budget")
            planned = uniform.because("fell back: no gain is predicted for the budget plan")
            judged = {"fell_back": 1}
        planned.write(out)
        return planned.metrics(self.model) | metrics | judged

    def expected(self, sites: Sequence[Site]) -> Mapping[str, int]:
        """Return the uniform rank of the same budget, per block site."""
        blocks = [site for site in sites if site.kind == "block"]
        rank = self.like
        if rank is None:
            prices, limit = self._budget(self.method, sites)
            rank = prices.largest_uniform(limit, self.grid)
        return {s.name: min(rank, largest_rank(self.method, s, self.grid)) for s in blocks}

    def _budget(self, method: Method, sites: Sequence[Site]) -> tuple[Prices, float]:
        """Return what directions cost under ``method``, and the limit in the setting's unit."""
        if self.overhead is not None:
            prices, limit = in_forwards(Workload.alone(self), method, self.grid), self.overhead
        else:
            prices = in_bits(self.model, method, sites, self.grid)
            limit = self.bits or 0.0
        if self.like is not None:
            return prices, prices.total(prices.uniform(self.like))
        prices.check(limit, "rank.bits" if self.overhead is None else "rank.overhead")
        return prices, limit

    def _bought(
        self,
        gains: Mapping[str, float],
        spectra: Mapping[str, Spectrum],
        prices: Prices,
        limit: float,
    ) -> dict[str, int]:
        """Return the ranks that lower the predicted error most within the limit, by site."""
        names = list(gains)
        steps, _ = water_fill(
            [gains[n] * spectra[n].steps(self.grid, prices.most[n]) for n in names],
            [self.grid * prices.each[n] for n in names],
            # A budget that is a sum of prices must not be missed by its last bit.
            prices.room(limit) * (1 + 1e-12),
        )
        return {name: self.grid * count for name, count in zip(names, steps, strict=True)}

    def _gated(
        self, budgeted: Planned, uniform: Planned, basis: Artifact, device: torch.device
    ) -> tuple[Planned, dict[str, float]]:
        """Return the plan whose images are nearer to the 16-bit ones, and how the two compare."""
        if not self.gate:
            log.info("rank: the budget plan was not compared with a uniform rank (rank.gate=0)")
            return budgeted, {"fell_back": 0}
        prompts = self.prompts.load()[: self.gate]
        plans = [budgeted.lines, uniform.lines]
        ours, theirs = plans_psnr(
            self.model, plans, basis, prompts, batch=self.batch, device=device
        )
        gain = difference_interval(ours.tolist(), theirs.tolist())
        said = (
            f"{gain.mean:+.2f} dB [{gain.low:+.2f}, {gain.high:+.2f}] on {len(prompts)} "
            "calibration prompts"
        )
        fell_back = not gain.mean > 0
        if fell_back:
            log.warning("rank: fell back to the uniform rank; the budget plan's images: %s", said)
            planned = uniform.because(f"fell back: the budget plan was not better, {said}")
        else:
            log.info("rank: the budget plan stays; its images against a uniform rank's: %s", said)
            planned = budgeted.because(f"better than uniform: {said}")
        return planned, {
            "gate_gain_db": gain.mean,
            "gate_gain_low": gain.low,
            "gate_gain_high": gain.high,
            "gate_psnr": float(ours.mean()),
            "gate_psnr_uniform": float(theirs.mean()),
            "fell_back": int(fell_back),
        }


def _sensitivity(spectrum: Spectrum, rank: int, error: float) -> float:
    """Return g: error of the network per unit of energy that the site's main branch quantizes."""
    tail = spectrum.tail(rank)
    return error / tail if tail > 1e-12 * spectrum.energy else 0.0
