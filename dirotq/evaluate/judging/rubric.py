"""What a judge is asked: the criteria in words, and how the answer is to look."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Literal

from dirotq.evaluate.judging.answer import CRITERIA
from dirotq.evaluate.judging.pair import Correction, Pair


class Slot(Enum):
    """Where an image of the pair stands in a message."""

    FIRST = "A"
    SECOND = "B"


FORM = """\
Answer with one JSON object and nothing else:
{"perceptual_quality": {"reasons": "...", "verdict": "..."}, \
"prompt_alignment": {"reasons": "...", "verdict": "..."}}
reasons: what you see in image A and in image B that decides it, in one to three sentences.
verdict: "A" if image A is better, "B" if image B is better, "tie" if neither is.
If you can't judge these images, answer {"refusal": "why"} instead."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: texts and places for images, in order."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[str | Slot, ...]


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """The two criteria in words.

    ``version``  a name for these words, shown beside every result
    """

    recorded_as: ClassVar[str] = "dirotq.judging.rubric.Rubric"
    version: str
    perceptual_quality: str
    prompt_alignment: str

    def conversation(self, pair: Pair, corrections: Sequence[Correction]) -> list[Turn]:
        """Messages for a model: the task, the pair, and every answer that did not pass so far."""
        criteria = "\n".join(f"- {name}: {getattr(self, name)}" for name in CRITERIA)
        task = (
            "You compare two images that were generated from the same text prompt, by two versions "
            "of one model. Judge two criteria, each by itself:\n"
            f"{criteria}\n"
            "The order of the images means nothing. Say tie where you see no difference, or none "
            "that matters; do not guess.\n\n"
            f"{FORM}"
        )
        turns = [
            Turn("system", (task,)),
            Turn(
                "user",
                (f"Prompt: {pair.prompt.text}", "Image A:", Slot.FIRST, "Image B:", Slot.SECOND,
                 "Compare image A with image B."),
            ),
        ]  # fmt: skip
        for correction in corrections:
            again = f"That answer can't be used: {correction.problem}\n\n{FORM}"
            turns += [Turn("assistant", (correction.text,)), Turn("user", (again,))]
        return turns
