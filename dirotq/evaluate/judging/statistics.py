"""What answers say: outcomes of pairs, win rates, position bias, consistency, with intervals.

One prompt is one observation: orders and repeats of it are not independent of each other, so every
share is first one prompt's, then a mean over prompts, whose interval comes from resampling prompts.

A mark is a judge's word for the candidate: 1 it won, 0 it lost, 0.5 tie; None where no answer came.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from dirotq.evaluate.judging.answer import CRITERIA
from dirotq.evaluate.judging.asking import OUTCOMES
from dirotq.evaluate.judging.questions import SIDES
from dirotq.evaluate.statistics import mean_interval, proportion_interval

Row = Mapping[str, Any]
Marks = list[float | None]
"""Of one pair: with the reference shown first, with the candidate shown first."""

PAIR_OUTCOMES = ("win", "loss", "tie", "inconsistent", "unjudged")


def summarize(rows: Iterable[Row]) -> dict[str, Any]:
    """Return each comparison's statistics: {comparison: {"requests": {...}, criterion: {...}}}."""
    by_name: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_name[row["comparison"]].append(row)
    return {
        name: {"requests": _requests(found)} | {c: _criterion(found, c) for c in CRITERIA}
        for name, found in by_name.items()
    }


def pairs(rows: Iterable[Row], criterion: str) -> dict[tuple[int, int], Marks]:
    """Return {(prompt, repeat): marks} of one comparison's answers, sorted."""
    found: dict[tuple[int, int], Marks] = defaultdict(lambda: [None, None])
    for row in rows:
        found[row["index"], row["repeat"]][SIDES.index(row["first"])] = _mark(row, criterion)
    return dict(sorted(found.items()))


def pair_outcome(reference_first: float | None, candidate_first: float | None) -> str:
    """Return what the marks of both orders of one pair say about the candidate.

    Both orders must agree for a win, a loss or a tie; every disagreement is ``inconsistent``.
    """
    if reference_first is None or candidate_first is None:
        return "unjudged"
    if reference_first != candidate_first:
        return "inconsistent"
    return {1.0: "win", 0.5: "tie", 0.0: "loss"}[reference_first]


def share(counts: Iterable[tuple[float, float]]) -> dict[str, float] | None:
    """Return the mean over prompts of part / whole, its 95 % interval and n.

    ``counts`` are (part, whole) of each prompt; n counts those whose whole is not 0. None without
    such a prompt. Where all prompts have the same share, resampling them says nothing and the
    interval is Wilson's.
    """
    shares = [part / whole for part, whole in counts if whole]
    if not shares:
        return None
    alike = min(shares) == max(shares)
    found = proportion_interval(sum(shares), len(shares)) if alike else mean_interval(shares)
    return found.as_dict() | {"n": len(shares)}


def _requests(rows: Sequence[Row]) -> dict[str, int]:
    return {
        "asked": len(rows),
        **{outcome: sum(row["outcome"] == outcome for row in rows) for outcome in OUTCOMES},
        # Answers that did not pass and were sent back, and requests that had to be sent again.
        "corrected": sum(max(len(row["texts"]) - 1, 0) for row in rows),
        "retries": sum(row["retries"] for row in rows),
    }


def _criterion(rows: Sequence[Row], criterion: str) -> dict[str, Any]:
    by_prompt: dict[int, list[Marks]] = defaultdict(list)
    outcomes = dict.fromkeys(PAIR_OUTCOMES, 0)
    for (index, _), marks in pairs(rows, criterion).items():
        by_prompt[index].append(marks)
        outcomes[pair_outcome(*marks)] += 1
    prompts = [_counts(found) for found in by_prompt.values()]
    return {name: share(p[name] for p in prompts) for name in prompts[0]} | {"outcomes": outcomes}


def _counts(pairs: Sequence[Marks]) -> dict[str, tuple[float, float]]:
    """Return {statistic: (part, whole)} of one prompt, from the marks of its repeats."""
    # Half a pair would mix the order into everything but the comparison of repeats.
    both = [(p, s) for p, s in pairs if p is not None and s is not None]
    outcomes = Counter(pair_outcome(plain, swapped) for plain, swapped in both)
    # Shown first, the reference is image A and has 1 - mark; the candidate has its mark.
    first = [m for plain, swapped in both for m in (1 - plain, swapped) if m != 0.5]
    repeats = [
        one == other
        for order in zip(*pairs)
        for one, other in combinations([mark for mark in order if mark is not None], 2)
    ]
    return {
        "win_rate": (sum(plain + swapped for plain, swapped in both) / 2, len(both)),
        "decided_win_rate": (outcomes["win"], outcomes["win"] + outcomes["loss"]),
        "first_slot": (sum(first), len(first)),
        "order_consistency": (len(both) - outcomes["inconsistent"], len(both)),
        "self_consistency": (sum(repeats), len(repeats)),
    }


def _mark(row: Row, criterion: str) -> float | None:
    if row["outcome"] != "answered":
        return None
    verdict = row["answer"][criterion]["verdict"]
    return 0.5 if verdict == "tie" else float((verdict == "A") == (row["first"] == "candidate"))
