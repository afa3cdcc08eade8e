"""judge.html: the numbers of a judging, and the pairs that the candidate lost."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from dirotq.evaluate.judging.answer import CRITERIA
from dirotq.evaluate.judging.questions import SIDES, Side
from dirotq.evaluate.judging.statistics import PAIR_OUTCOMES, Row, pair_outcome, pairs
from dirotq.evaluate.png import png_url

SHARES = {
    "win_rate": "win rate",
    "decided_win_rate": "win rate of decided pairs",
    "first_slot": "decisive answers for the first image",
    "order_consistency": "both orders agree",
    "self_consistency": "repeats agree",
}


def write_page(
    path: Path,
    report: Mapping[str, Any],
    rows: Sequence[Row],
    image: Callable[[Side, int], Tensor],
    count: int,
) -> None:
    """Render ``report`` (the content of judge.json).

    rows   the answers about the comparison ``packed``
    image  its image [3, H, W] of a side and prompt
    count  lost pairs to show
    """
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True
    ).get_template("judge.html.j2")
    lost = [
        pair | {"images": [png_url(image(side, pair["index"])) for side in SIDES]}
        for pair in _lost(rows)[:count]
    ]
    page = template.render(
        report=report, lost=lost, criteria=CRITERIA, shares=SHARES, outcomes=PAIR_OUTCOMES
    )
    path.write_text(page)


def _lost(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return pairs with a loss in either criterion, sorted by prompt, with the judge's reasons."""
    answers: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        answers.setdefault((row["index"], row["repeat"]), []).append(row)
    losses: dict[tuple[int, int], list[str]] = {}
    for criterion in CRITERIA:
        for key, marks in pairs(rows, criterion).items():
            if pair_outcome(*marks) == "loss":
                losses.setdefault(key, []).append(criterion)
    return [
        {
            "index": key[0],
            "prompt": answers[key][0]["prompt"],
            "criteria": criteria,
            "reasons": [
                (row["first"], criterion, row["answer"][criterion]["reasons"])
                for criterion in criteria
                for row in answers[key]
            ],
        }
        for key, criteria in sorted(losses.items())
    ]
