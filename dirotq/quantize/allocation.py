"""Water-filling: spend a budget where a unit of it removes most (docs/method.md M6).

Letters: S sites, K_s steps that site s can take.
"""

import heapq
from collections.abc import Sequence

from torch import Tensor

from dirotq.errors import NumericalError


def water_fill(
    gains_SK: Sequence[Tensor], prices_S: Sequence[float], budget: float
) -> tuple[list[int], float]:
    """Steps that each site takes, and what is left of the budget.

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
