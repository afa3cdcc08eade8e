"""Intervals for means, paired differences and proportions: what a table may claim.

N images, B resamples.  Paired: both methods made the same N images (same prompts, same noise), so
what varies from prompt to prompt cancels in the difference.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
CHUNK = 1 << 22
"""Numbers drawn at a time."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with the ends of its confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the 95 % percentile bootstrap interval of a mean: of N values drawn with replacement.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.

    The same values give the same interval on every machine. One value has an interval of width 0:
    there is nothing to learn from about others.

    Raises ValueError for no values, or values that are not finite.
    """
    x_N = np.asarray(values, np.float64)
    if x_N.ndim != 1 or not x_N.size or not np.isfinite(x_N).all():
        raise ValueError(f"an interval needs one or more finite values, not {values!r:.80}")
    generator = np.random.Generator(np.random.PCG64(0))
    rows = max(CHUNK // x_N.size, 1)
    means_B = np.concatenate(
        [
            x_N[generator.integers(x_N.size, size=(min(rows, RESAMPLES - done), x_N.size))].mean(1)
            for done in range(0, RESAMPLES, rows)
        ]
    )
    low, high = np.quantile(means_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(x_N.mean()), float(low), float(high))


def difference_interval(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Return :func:`mean_interval` of the paired differences: images are resampled, not methods.

    Raises ValueError if the two are not of one length, and what :func:`mean_interval` raises.
    """
    if len(values) != len(others):
        raise ValueError(f"paired values: {len(values)} and {len(others)} are not of one length")
    apart = np.asarray(values, np.float64) - np.asarray(others, np.float64)
    return mean_interval(apart.tolist())


def proportion_interval(hits: float, total: int) -> Interval:
    """Return Wilson's 95 % score interval of a proportion (Wilson, J. Am. Stat. Assoc. 22, 1927).

    A bootstrap of yes and no answers has width 0 where all are alike; this one has not. ``hits``
    may be fractional (a tie as half a win).

    Raises ValueError unless 0 <= hits <= total and total >= 1.
    """
    if not (total >= 1 and 0 <= hits <= total):
        raise ValueError(f"{hits} hits of {total} is no proportion")
    z, share = NormalDist().inv_cdf((1 + LEVEL) / 2), hits / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    # At the ends, rounding may leave the interval a hair's breadth inside of the estimate.
    return Interval(share, min(max(center - half, 0.0), share), max(min(center + half, 1.0), share))
