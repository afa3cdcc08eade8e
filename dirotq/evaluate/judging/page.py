"""judge.html: the numbers of a judging, and the pairs that the candidate lost."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from dirotq.evaluate.judging.answer import CRITERIA
from dirotq.evaluate.judging.questions import Side
from dirotq.evaluate.judging.statistics import PAIR_OUTCOMES, Row, pair_outcome, pairs
from dirotq.evaluate.png import png_url

SHARES = {
    "win_rate": "win rate",
    "decided_win_rate": "win rate of decided pairs",
    "first_slot": "decisive answers for the first image",
    "order_consistency": "both orders agree",
    "self_consistency": "repeats agree",
}

ImageOf = Callable[[Side, int], Tensor]


def write_page(
    path: Path,
    report: Mapping[str, Any],
    rows: Sequence[Row],
    images: Mapping[str, ImageOf],
    count: int,
) -> None:
    """Render ``report`` (the content of judge.json).

    images  per comparison, the image [3, H, W] of a side and prompt
    count   lost pairs to show
    """
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True
    ).get_template("judge.html.j2")
    lost = _lost([row for row in rows if row["comparison"] == "packed"])[:count]
    shown = [
        pair | {"images": [png_url(images["packed"](s, pair["index"])) for s in SHOWN]}
        for pair in lost
    ]
    page = template.render(
        report=report, lost=shown, criteria=CRITERIA, shares=SHARES, outcomes=PAIR_OUTCOMES
    )
    path.write_text(page)


SHOWN: tuple[Side, Side] = ("reference", "candidate")


def _lost(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Pairs with a loss in either criterion, in the order of prompts, with the judge's reasons."""
    by_pair: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        by_pair.setdefault((row["index"], row["repeat"]), []).append(row)
    losses: dict[tuple[int, int], list[str]] = {}
    for criterion in CRITERIA:
        for key, marks in pairs(rows, criterion).items():
            if pair_outcome(*marks) == "loss":
                losses.setdefault(key, []).append(criterion)
    return [
        {
            "index": key[0],
            "prompt": by_pair[key][0]["prompt"],
            "criteria": losses[key],
            "reasons": [
                (row["first"], criterion, row["answer"][criterion]["reasons"])
                for criterion in losses[key]
                for row in by_pair[key]
            ],
        }
        for key in sorted(losses)
    ]
