"""What directions cost, in bits or in FLOPs, and what a budget of it buys (docs/method.md M6).

Letters: S sites, K_s steps that site s can take.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dirotq.errors import ConfigError, NumericalError
from dirotq.kernels.formats.transform import PROJECT
from dirotq.models.family import Site
from dirotq.packed.swap import effective_bits, packed_bits
from dirotq.quantize.plan import Method
from dirotq.quantize.planning import largest_rank
from dirotq.quantize.workload import Workload
from dirotq.sources.model import DiffusersModel


@dataclass(frozen=True, slots=True)
class Prices:
    """The linear cost of a choice of ranks: base + Σ each_s r_s, over the sites that may choose.

    ``base``  with no direction at those sites; sites whose rank an override fixes are in it
    ``each``  of one direction of a site, {site: cost}
    ``most``  directions that a site can protect, {site: rank}
    ``unit``  divides costs into what a setting is given in
    """

    base: float
    each: Mapping[str, float]
    most: Mapping[str, int]
    unit: float

    def total(self, ranks: Mapping[str, int]) -> float:
        """Return the cost in the setting's unit."""
        return (self.base + sum(self.each[s] * ranks[s] for s in self.each)) / self.unit

    def uniform(self, rank: int) -> dict[str, int]:
        """Return the same rank everywhere, as far as each site has it."""
        return {site: min(rank, most) for site, most in self.most.items()}

    def room(self, limit: float) -> float:
        """Return what ``limit`` (the setting's unit) leaves for directions, in that of ``each``."""
        return limit * self.unit - self.base

    def largest_uniform(self, limit: float, grid: int) -> int:
        """Return the largest rank that, taken everywhere, stays within ``limit``."""
        rank = 0
        while rank < max(self.most.values()) and self.total(self.uniform(rank + grid)) <= limit:
            rank += grid
        return rank

    def check(self, limit: float, setting: str) -> None:
        """Raise ConfigError, with the reachable range, for a limit that no choice or any fits."""
        least = self.total(self.uniform(0))
        most = self.total(self.uniform(max(self.most.values(), default=0)))
        if not least <= limit <= most:
            raise ConfigError(
                f"{setting}={limit:g} is out of reach: without any protected direction this plan "
                f"takes {least:.4g}, with all that method.leading keeps {most:.4g}. Use a value "
                f"between; change the number formats for less, method.leading for more"
            )


def in_bits(model: DiffusersModel, method: Method, sites: Sequence[Site], grid: int) -> Prices:
    """Price bits per parameter of the packed transformer (dirotq/packed/swap.py)."""
    free, most = _free(method, sites, grid)
    entries = [(site, spec) for site in sites if (spec := method.spec(site, 0)) is not None]
    skeleton = model.shapes()
    parameters = sum(p.numel() for p in skeleton.parameters())
    each = {site.name: _direction_bits(method, site, grid) for site in free}
    return Prices(round(effective_bits(skeleton, entries) * parameters), each, most, parameters)


def in_forwards(work: Workload, method: Method, grid: int) -> Prices:
    """Price FLOPs of the low-rank branches as a share of the 16-bit forward's.

    Of one denoiser call, at the size the model is called with.

    A direction of a site costs 2 (2 D + N) FLOPs per token: c = x P, c Pᵀ and c Vᵀ. Both sides of
    the share run in 16 bits, so a machine's rate cancels out. No measurement stands behind it.
    """
    free, most = _free(method, work.sites, grid)
    each = {
        site.name: work.tokens(site)
        * 2.0
        * (2 * site.in_features + sum(site.out_features))
        / work.network_flops
        for site in work.block_sites
    }
    fixed = [(s, o.rank) for s in work.block_sites if (o := method.override(s)) and o.rank]
    base = sum(each[site.name] * rank for site, rank in fixed)
    return Prices(base, {site.name: each[site.name] for site in free}, most, 1.0)


def refuse_unpriced(method: Method) -> None:
    """Raise ConfigError for a method whose directions take no energy out of the main branch at a
    price each.
    """
    branch = method.branch
    if branch != PROJECT or method.transform.kind == "dense":
        raise ConfigError(
            f"rank=budget needs a projecting basis, whose directions have a price each; method "
            f"{method.name} has transform={method.transform.kind}, branch="
            f"{branch and f'{branch.kind} of {branch.bits} bits'}. "
            "Use method=dirotq, or a fixed rank (rank=default)"
        )


def water_fill(
    gains_SK: Sequence[Tensor], prices_S: Sequence[float], budget: float
) -> tuple[list[int], float]:
    """Return steps that each site takes, and what is left of the budget.

    gains_SK  what each site's 1st, 2nd, ... step gains, >= 0 and falling, one [K_s] per site
    prices_S  what one step of a site costs, > 0
    budget    to spend, >= 0

    Greedy: the step with the most gain per price first. A site whose next step is too dear takes no
    more; steps that gain nothing are not taken. As gains fall, no choice of the same total price
    gains more as long as nothing was too dear (Fox, 1966); where something was, less is lost than
    the first such step would have gained. With equal prices the result is optimal for every budget.
    More budget never gains less.

    Raises NumericalError for gains that rise, are negative or not finite.
    """
    for site, gains_K in enumerate(gains_SK):
        falling = bool((gains_K[1:] <= gains_K[:-1] * (1 + 1e-9)).all())
        if not bool(gains_K.isfinite().all()) or bool((gains_K < 0).any()) or not falling:
            raise NumericalError(
                f"the gains of site number {site} are not finite and falling to zero: {gains_K}"
            )
    steps_S = [0] * len(gains_SK)
    gains = [gains_K.tolist() for gains_K in gains_SK]
    # Ties go to the earlier site.
    heap = [(-g[0] / prices_S[s], s) for s, g in enumerate(gains) if g and g[0] > 0]
    heapq.heapify(heap)
    while heap:
        _, site = heapq.heappop(heap)
        if prices_S[site] > budget:
            continue
        budget -= prices_S[site]
        steps_S[site] += 1
        taken = steps_S[site]
        if taken < len(gains[site]) and gains[site][taken] > 0:
            heapq.heappush(heap, (-gains[site][taken] / prices_S[site], site))
    return steps_S, budget


def _free(method: Method, sites: Sequence[Site], grid: int) -> tuple[list[Site], dict[str, int]]:
    """Return block sites whose rank nothing fixes, and the most that each can have."""
    free = [
        site
        for site in sites
        if method.protects(site) and not ((o := method.override(site)) and o.decides)
    ]
    if not free:
        raise ConfigError("rank=budget: method.overrides fix every site; nothing is left to choose")
    return free, {site.name: largest_rank(method, site, grid) for site in free}


def _direction_bits(method: Method, site: Site, grid: int) -> float:
    """Return bits of one more direction, P's and V's columns: 16 (D + N) with both in 16 bits."""
    most = largest_rank(method, site, grid)
    low, high = method.spec(site, 0), method.spec(site, most)
    assert low is not None and high is not None
    return (packed_bits(site, high) - packed_bits(site, low)) / most
