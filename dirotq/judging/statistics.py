"""What answers say: outcomes of pairs, win rates, position bias, consistency, with intervals.

One prompt is one observation: orders and repeats of it are not independent, so intervals come from
resampling prompts (percentile bootstrap; Efron and Tibshirani 1993, chapter 13).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from dirotq.judging.answer import CRITERIA
from dirotq.judging.asking import OUTCOMES
from dirotq.judging.questions import SIDES, mark

RESAMPLES = 10_000
LEVEL = 0.95
CHUNK = 1 << 21
"""Resampled prompts held in memory at a time."""

Row = Mapping[str, Any]

PAIR_OUTCOMES = ("win", "loss", "tie", "inconsistent", "unjudged")


def pair_outcome(reference_first: float | None, candidate_first: float | None) -> str:
    """What two orders of one pair say about the candidate, from its marks (1, 0.5, 0; None: none).

    Both orders must agree for a win, a loss or a tie; every disagreement is ``inconsistent``.
    """
    if reference_first is None or candidate_first is None:
        return "unjudged"
    if reference_first != candidate_first:
        return "inconsistent"
    return {1.0: "win", 0.5: "tie", 0.0: "loss"}[reference_first]


def ratio(part: Sequence[float], whole: Sequence[float]) -> dict[str, float] | None:
    """sum(part) / sum(whole) over prompts, with its 95 % interval; None if the whole is nothing.

    ``n`` counts the prompts that take part, those whose whole is something.
    """
    parts, wholes = np.asarray(part, float), np.asarray(whole, float)
    counted = wholes > 0
    parts, wholes = parts[counted], wholes[counted]
    if not (n := len(parts)):
        return None
    rng = np.random.default_rng(0)
    drawn = []
    for start in range(0, RESAMPLES, size := max(CHUNK // n, 1)):
        picks = rng.integers(0, n, (min(size, RESAMPLES - start), n))
        drawn.append(parts[picks].sum(1) / wholes[picks].sum(1))
    low, high = np.quantile(np.concatenate(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = parts.sum() / wholes.sum()
    return {"value": float(value), "low": float(low), "high": float(high), "n": n}


def summarize(rows: Iterable[Row]) -> dict[str, Any]:
    """Statistics of each comparison: {comparison: {"requests": {...}, criterion: {...}}}."""
    by_name: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_name[row["comparison"]].append(row)
    return {
        name: {"requests": _requests(found)} | {c: _criterion(found, c) for c in CRITERIA}
        for name, found in by_name.items()
    }


def pairs(rows: Iterable[Row], criterion: str) -> dict[tuple[int, int], list[float | None]]:
    """{(prompt, repeat): the candidate's marks, reference first and candidate first}."""
    found: dict[tuple[int, int], list[float | None]] = defaultdict(lambda: [None, None])
    for row in rows:
        place = SIDES.index(row["first"])
        given = mark(row, criterion) if row["outcome"] == "answered" else None
        found[row["index"], row["repeat"]][place] = given
    return dict(sorted(found.items()))


def _requests(rows: Sequence[Row]) -> dict[str, int]:
    return {
        "asked": len(rows),
        **{outcome: sum(row["outcome"] == outcome for row in rows) for outcome in OUTCOMES},
        # Answers that did not pass and were sent back, and requests that had to be sent again.
        "corrected": sum(max(len(row["texts"]) - 1, 0) for row in rows),
        "retries": sum(row["retries"] for row in rows),
    }


@dataclass
class _Tally:
    """Counts of one prompt."""

    marks: float = 0.0
    judged: int = 0  # pairs with both orders answered
    agreeing: int = 0
    wins: int = 0
    losses: int = 0
    first_slot: int = 0  # decisive answers for image A
    decisive: int = 0
    repeats_alike: int = 0
    repeats: int = 0
    by_order: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))


def _criterion(rows: Sequence[Row], criterion: str) -> dict[str, Any]:
    tallies: dict[int, _Tally] = defaultdict(_Tally)
    outcomes = dict.fromkeys(PAIR_OUTCOMES, 0)
    for (index, _), (plain, swapped) in pairs(rows, criterion).items():
        outcome = pair_outcome(plain, swapped)
        outcomes[outcome] += 1
        _count(tallies[index], outcome, plain, swapped)
    for tally in tallies.values():
        for marks in tally.by_order.values():
            alike = [a == b for a, b in combinations(marks, 2)]
            tally.repeats_alike += sum(alike)
            tally.repeats += len(alike)

    def share(part: str, whole: str) -> dict[str, float] | None:
        found = tallies.values()
        return ratio([getattr(t, part) for t in found], [getattr(t, whole) for t in found])

    decided = [t.wins + t.losses for t in tallies.values()]
    return {
        "win_rate": share("marks", "judged"),
        "decided_win_rate": ratio([t.wins for t in tallies.values()], decided),
        "first_slot": share("first_slot", "decisive"),
        "order_consistency": share("agreeing", "judged"),
        "self_consistency": share("repeats_alike", "repeats"),
        "outcomes": outcomes,
    }


def _count(tally: _Tally, outcome: str, plain: float | None, swapped: float | None) -> None:
    for order, given in enumerate((plain, swapped)):
        if given is not None:
            tally.by_order[order].append(given)
    if plain is None or swapped is None:
        return  # half a pair would mix the order into everything below
    tally.marks += (plain + swapped) / 2
    tally.judged += 1
    tally.agreeing += outcome != "inconsistent"
    tally.wins += outcome == "win"
    tally.losses += outcome == "loss"
    # Shown first, the reference is image A and has 1 - mark; the candidate has its mark.
    for first in (1 - plain, swapped):
        tally.decisive += first != 0.5
        tally.first_slot += first == 1
