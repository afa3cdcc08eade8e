"""From a rank per site to the plan: spectra in, lines of the plan out.

Letters: L leading directions that ``basis`` kept.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dirotq.errors import ConfigError
from dirotq.models.coverage import share_kept
from dirotq.models.family import Site
from dirotq.packed.swap import effective_bits
from dirotq.pipeline.artifact import Artifact
from dirotq.quantize.overrides import check_overrides, parse_overrides
from dirotq.quantize.plan import Method, SitePlan, write_plan
from dirotq.quantize.tensors import load_site, site_file
from dirotq.sources.model import DiffusersModel


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Variances of a site's activation along its leading directions.

    ``variances_L``  float64 [L], in the order of ranks: the largest first where they are principal
    ``energy``       the sum of all D variances, of which L are known
    """

    variances_L: Tensor
    energy: float

    def tail(self, rank: int) -> float:
        """Return the energy outside of the ``rank`` leading directions: what will be quantized."""
        return max(self.energy - float(self.variances_L[:rank].sum()), 0.0)

    def left(self) -> Tensor:
        """Return shares of the energy outside of 1, 2, ... leading directions, float64 [L]."""
        return 1 - self.variances_L.cumsum(0) / self.energy

    def steps(self, grid: int, most: int) -> Tensor:
        """Return variances of the 1st, 2nd, ... ``grid`` directions, up to ``most``: float64.

        Directions that count the weights are not sorted by variance. A step that has more than the
        one before shares with it, so that what is returned falls. Sums over first steps are what
        these hold, or more between steps that share.
        """
        found: list[list[float]] = []  # steps that share: [mean, how many]
        for variance in self.variances_L[:most].unflatten(0, (-1, grid)).sum(1).tolist():
            found.append([variance, 1])
            while len(found) > 1 and found[-1][0] > found[-2][0]:
                mean, count = found.pop()
                found[-1] = [
                    (found[-1][0] * found[-1][1] + mean * count) / (found[-1][1] + count),
                    found[-1][1] + count,
                ]
        shared = [mean for mean, count in found for _ in range(int(count))]
        return torch.tensor(shared, dtype=torch.float64, device=self.variances_L.device)

    def told(self, rank: int, site: Site) -> str:
        """Say what a rank does, for the plan."""
        share = float(self.variances_L[:rank].sum()) / max(self.energy, 1e-300)
        return f"{rank} of {site.in_features} directions hold {share:.1%} of the energy"


def read_spectrum(basis: Artifact, site: Site) -> Spectrum:
    """Read that of one site from the ``basis`` artifact."""
    found = load_site(basis.file(f"sites/{site_file(site.name)}"))
    return Spectrum(found["variances"].flip(0), float(found["energy"]))


@dataclass(frozen=True, slots=True)
class Planned:
    """Lines of the plan, and the sites that stay in 16 bits with the reason."""

    lines: list[SitePlan] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)

    @property
    def blocks(self) -> list[SitePlan]:
        return [line for line in self.lines if line.site.kind == "block"]

    def among(self, names: Collection[str]) -> list[SitePlan]:
        """Return the lines of block sites of these names."""
        return [line for line in self.blocks if line.site.name in names]

    def because(self, reason: str) -> "Planned":
        """Return the same plan with a further reason for the ranks of block sites."""
        lines = [
            replace(line, why=f"{line.why}; {reason}") if line.site.kind == "block" else line
            for line in self.lines
        ]
        return Planned(lines, self.ignored)

    def write(self, out: Path) -> None:
        """Write ``plan.json`` and ``kept.json``."""
        write_plan(out / "plan.json", self.lines)
        (out / "kept.json").write_text(json.dumps(self.ignored, indent=1) + "\n")

    def metrics(self, model: DiffusersModel) -> dict[str, float]:
        skeleton, ranks = model.shapes(), [line.spec.rank for line in self.blocks]
        packed = [(line.site, line.spec) for line in self.lines]
        return {
            "mean_rank": sum(ranks) / max(len(ranks), 1),
            "bits_per_parameter": effective_bits(skeleton, packed),
            "sites_kept": len(self.ignored),
            "sites_finer": sum(line.spec.activations.bits == 8 for line in self.blocks),
            "block_parameters_kept": share_kept(skeleton, (site for site, _ in packed)),
        }


def make_plan(
    method: Method, sites: Iterable[Site], choose: Callable[[Site], tuple[int, str]]
) -> Planned:
    """Return a line for every site that the method quantizes, in the order of ``sites``.

    choose  the rank of a site that protects directions, and why; not asked where an override says
    """
    made = Planned()
    for site in sites:
        override = method.override(site)
        rank, why = 0, f"method {method.name} protects no direction"
        if site.kind == "modulator":
            why = "modulator: one row per image, so 16-bit activations cost nothing"
            if site.text:
                why = "keys and values of the text: few rows, so 16-bit activations cost little"
        decided = override is not None and override.decides
        if method.protects(site) and not decided:
            rank, why = choose(site)
        if override is not None:
            why = override.why if decided else f"{why}; {override.why}"
        spec = method.spec(site, rank)
        if spec is None:
            what = "keys and values of the text" if site.text else "modulators"
            made.ignored[site.name] = why if override else f"{what} stay in 16 bits"
        else:
            made.lines.append(SitePlan(site, spec, method.rounding, method.weight_clip, why))
    return made


def refuse_rules(rules: Mapping[str, Any], grid: int) -> None:
    """Raise ConfigError unless exactly one of ``rules``, {setting of rank: value}, is given."""
    if sum(value is not None for value in rules.values()) != 1:
        said = ", ".join(f"rank.{name}={value}" for name, value in rules.items())
        raise ConfigError(f"{said}: set exactly one of them and leave the others null")
    if grid < 1:
        raise ConfigError(f"rank.grid={grid}: use at least 1; the kernels want 8")


def refuse_fewer(leading: int | None, method: Method) -> None:
    """Raise ConfigError if ``basis`` keeps fewer directions than ranks are chosen from."""
    if method.branch is None or leading is None:
        return
    if method.leading is None or leading < method.leading:
        raise ConfigError(
            f"basis.leading={leading} keeps fewer directions than method.leading="
            f"{'null (all)' if method.leading is None else method.leading}, which ranks are chosen "
            "from: set method.leading alone, basis follows it"
        )


def check_plan(
    method: Method, sites: Sequence[Site], grid: int, rank: Callable[[Site], int]
) -> None:
    """Refuse what the shapes alone can refute.

    rank  of a site that protects directions, as far as it is known

    Raises ConfigError naming the setting or the site.
    """
    overrides = parse_overrides(method.overrides)
    check_overrides(overrides, sites, grid)
    for index, override in enumerate(overrides):
        if method.leading is not None and (override.rank or 0) > method.leading:
            raise ConfigError(
                f"method.overrides[{index}].rank={override.rank} exceeds method.leading="
                f"{method.leading}, the eigenvectors that `basis` keeps per site: set "
                f"method.leading={override.rank} too"
            )
    for site in sites:
        method.spec(site, rank(site) if method.protects(site) else 0)


def largest_rank(method: Method, site: Site, grid: int) -> int:
    """Return the most directions that can be protected: kept by ``basis``, on the grid."""
    return min(method.leading or site.in_features, site.in_features) // grid * grid
