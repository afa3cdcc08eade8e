"""What is asked: pairs of images of one prompt, in both orders, as often as told."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from torch import Tensor

from dirotq.sources.prompts import Prompt

Side = Literal["reference", "candidate"]
SIDES: tuple[Side, Side] = ("reference", "candidate")


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


@dataclass(frozen=True, slots=True)
class Pair:
    """Two images of one prompt, [3, H, W] in [0, 1], in the order in which they are shown."""

    prompt: Prompt
    first: Tensor
    second: Tensor


@dataclass(frozen=True, slots=True)
class Correction:
    """An earlier answer to the same question, and why it could not be used."""

    text: str
    problem: str


def questions(comparisons: Iterable[str], prompts: int, repeats: int) -> list[Question]:
    """Return every pair in both orders; prompt by prompt, so that a part of them is a fair part."""
    return [
        Question(name, index, first, repeat)
        for index, repeat, name, first in product(
            range(prompts), range(repeats), list(comparisons), SIDES
        )
    ]


def question_of(row: Mapping[str, Any]) -> Question:
    """Return the question that a line of answers.jsonl answers."""
    return Question(row["comparison"], row["index"], row["first"], row["repeat"])
