"""What answers say: outcomes of pairs, win rates, position bias, consistency, with intervals.

One prompt is one observation: orders and repeats of it are not independent of each other, so every
share is first one prompt's, then a mean over prompts, whose interval comes from resampling prompts.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from dirotq.evaluate.judging.answer import CRITERIA
from dirotq.evaluate.judging.asking import OUTCOMES
from dirotq.evaluate.judging.questions import SIDES, mark
from dirotq.evaluate.statistics import mean_interval, proportion_interval

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


def share(part: Sequence[float], whole: Sequence[float]) -> dict[str, float] | None:
    """Mean over prompts of part / whole, 95 % interval and n, the prompts whose whole is not 0.

    None without such a prompt. Where all prompts have the same share, resampling them says nothing
    and the interval is Wilson's.
    """
    shares = [p / w for p, w in zip(part, whole, strict=True) if w]
    if not shares:
        return None
    alike = min(shares) == max(shares)
    found = proportion_interval(sum(shares), len(shares)) if alike else mean_interval(shares)
    return found.as_dict() | {"n": len(shares)}


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
    decided: int = 0
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

    counts = tallies.values()

    def of(part: str, whole: str) -> dict[str, float] | None:
        return share([getattr(t, part) for t in counts], [getattr(t, whole) for t in counts])

    return {
        "win_rate": of("marks", "judged"),
        "decided_win_rate": of("wins", "decided"),
        "first_slot": of("first_slot", "decisive"),
        "order_consistency": of("agreeing", "judged"),
        "self_consistency": of("repeats_alike", "repeats"),
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
    tally.decided += outcome in ("win", "loss")
    # Shown first, the reference is image A and has 1 - mark; the candidate has its mark.
    for first in (1 - plain, swapped):
        tally.decisive += first != 0.5
        tally.first_slot += first == 1
