"""Any two runs: how much closer to its 16-bit images one is, and whether that is chance.

Paired where both made images of the same prompts and noise: what varies from prompt to prompt
cancels in the differences, which are resampled as one (dirotq/evaluate/statistics.py). Unpaired
where the prompts differ: both means vary by themselves, and only large differences show.

N images, R runs, B resamples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from dirotq.evaluate.comparing.runs import Run
from dirotq.evaluate.statistics import CHUNK, LEVEL, RESAMPLES, Interval

MOST = 100
"""Runs of which every pair is compared: 4,950 pairs."""
ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


@dataclass(frozen=True, slots=True)
class Pair:
    """PSNR of run ``first`` minus that of ``second`` (places in the list of runs), in dB.

    ``closer``  prompts for which the first is closer; None where prompts differ
    """

    first: int
    second: int
    apart: Interval
    closer: int | None


def compared(runs: Sequence[Run]) -> list[Pair]:
    """Compare every two of the first ``MOST`` runs."""
    runs = runs[:MOST]
    groups: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for place, run in enumerate(runs):
        groups.setdefault(run.prompts, []).append(place)
    means_BR = np.empty((RESAMPLES, len(runs)))
    for places in groups.values():
        means_BR[:, places] = resampled_means(np.array([runs[p].psnr_N for p in places]).T)
    found = [pair for places in groups.values() for pair in _paired(runs, places, means_BR)]
    return sorted([*found, *_unpaired(runs, means_BR)], key=lambda pair: (pair.first, pair.second))


def resampled_means(x_NR: np.ndarray) -> np.ndarray:
    """Return means of N rows drawn with replacement, [B, R]: every column from the same rows.

    The draws are those of :func:`statistics.mean_interval`.
    """
    count = len(x_NR)
    generator = np.random.Generator(np.random.PCG64(0))
    rows = max(CHUNK // count, 1)
    means = []
    for done in range(0, RESAMPLES, rows):
        drawn = generator.integers(count, size=(min(rows, RESAMPLES - done), count))
        offset = np.arange(len(drawn))[:, None] * count
        weights = np.bincount((drawn + offset).ravel(), minlength=drawn.size)
        means.append(weights.reshape(drawn.shape) @ x_NR / count)
    return np.concatenate(means)


def _paired(runs: Sequence[Run], places: Sequence[int], means_BR: np.ndarray) -> Iterator[Pair]:
    for index, first in enumerate(places[:-1]):
        others = places[index + 1 :]
        ends = np.quantile(means_BR[:, [first]] - means_BR[:, others], ENDS, axis=0)
        for second, low, high in zip(others, *ends, strict=True):
            a, b = np.array(runs[first].psnr_N), np.array(runs[second].psnr_N)
            apart = Interval(float((a - b).mean()), float(low), float(high))
            yield Pair(first, second, apart, int((a > b).sum()))


def _unpaired(runs: Sequence[Run], means_BR: np.ndarray) -> Iterator[Pair]:
    # Shuffled: both columns may stem from the same draws.
    shuffled = np.random.Generator(np.random.PCG64(1)).permutation(RESAMPLES)
    for first, second in combinations(range(len(runs)), 2):
        if runs[first].prompts != runs[second].prompts:
            low, high = np.quantile(means_BR[:, first] - means_BR[shuffled, second], ENDS)
            mean = runs[first].psnr.mean - runs[second].psnr.mean
            yield Pair(first, second, Interval(mean, float(low), float(high)), None)
