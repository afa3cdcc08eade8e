"""Who is compared with whom, in which order and how often."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

Side = Literal["reference", "candidate"]
SIDES: tuple[Side, Side] = ("reference", "candidate")

Key = tuple[str, int, Side, int]


@dataclass(frozen=True, slots=True)
class Question:
    """One request.

    ``comparison``  its name
    ``index``       of the prompt
    ``first``       which side is shown as image A
    ``repeat``      0, 1, ...: the same question again, for self-consistency
    """

    comparison: str
    index: int
    first: Side
    repeat: int

    @property
    def key(self) -> Key:
        return self.comparison, self.index, self.first, self.repeat


def questions(comparisons: Iterable[str], prompts: int, repeats: int) -> list[Question]:
    """Every pair in both orders; prompt by prompt, so that a part of them is a fair part."""
    return [
        Question(name, index, first, repeat)
        for index, repeat, name, first in product(
            range(prompts), range(repeats), list(comparisons), SIDES
        )
    ]


def key_of(row: Mapping[str, Any]) -> Key:
    """The question that a line of answers.jsonl answers."""
    return row["comparison"], row["index"], row["first"], row["repeat"]


def mark(row: Mapping[str, Any], criterion: str) -> float:
    """An answer's mark for the candidate: 1 it won, 0 it lost, 0.5 tie."""
    verdict = row["answer"][criterion]["verdict"]
    if verdict == "tie":
        return 0.5
    return float((verdict == "A") == (row["first"] == "candidate"))
