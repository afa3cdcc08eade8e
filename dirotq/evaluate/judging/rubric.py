"""What a judge is asked: the criteria in words, and how the answer is to look."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dirotq.evaluate.judging.answer import CRITERIA
from dirotq.evaluate.judging.questions import Correction, Pair

FORM = """\
Answer with one JSON object and nothing else:
{"perceptual_quality": {"reasons": "...", "verdict": "..."}, \
"prompt_alignment": {"reasons": "...", "verdict": "..."}}
reasons: what you see in image A and in image B that decides it, in one to three sentences.
verdict: "A" if image A is better, "B" if image B is better, "tie" if neither is.
If you can't judge these images, answer {"refusal": "why"} instead."""

TASK = """\
You compare two images that were generated from the same text prompt, by two versions of one \
model. Judge two criteria, each by itself:
{criteria}
The order of the images means nothing. Say tie where you see no difference, or none that matters; \
do not guess.

{form}"""

Message = dict[str, Any]
"""``role``, and ``content``: a text, or a list of parts where there are images."""


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """The two criteria in words.

    ``version``  a name for these words, shown beside every result
    """

    recorded_as: ClassVar[str] = "dirotq.judging.rubric.Rubric"
    version: str
    perceptual_quality: str
    prompt_alignment: str

    def conversation(
        self, pair: Pair, corrections: Sequence[Correction], show: Callable[[Tensor], Message]
    ) -> list[Message]:
        """Return the messages: the task, the pair, and every answer that did not pass so far.

        show  makes the part of a message that shows an image [3, H, W], as the model takes it
        """
        criteria = "\n".join(f"- {name}: {getattr(self, name)}" for name in CRITERIA)
        shown = [
            text_part(f"Prompt: {pair.prompt.text}"),
            text_part("Image A:"),
            show(pair.first),
            text_part("Image B:"),
            show(pair.second),
            text_part("Compare image A with image B."),
        ]
        messages: list[Message] = [
            {"role": "system", "content": TASK.format(criteria=criteria, form=FORM)},
            {"role": "user", "content": shown},
        ]
        for correction in corrections:
            again = f"That answer can't be used: {correction.problem}\n\n{FORM}"
            messages += [
                {"role": "assistant", "content": correction.text},
                {"role": "user", "content": again},
            ]
        return messages


def text_part(text: str) -> Message:
    """Return a part of a message that is a text."""
    return {"type": "text", "text": text}
