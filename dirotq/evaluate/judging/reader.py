"""The embedded models' judge: an attribute reader behind the interface of a language model."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dirotq.errors import ConfigError
from dirotq.evaluate.attribute_judge import AttributeJudge
from dirotq.evaluate.judging.backend import Compare, Reply
from dirotq.evaluate.judging.questions import Correction, Pair
from dirotq.evaluate.judging.rubric import Rubric


@dataclass(frozen=True, kw_only=True)
class ReaderJudge:
    """Prompt alignment: the image that shows more of the captioned attributes wins, equal is a tie.

    Perceptual quality: always a tie. The reader was trained to name what clean renderings show; its
    confidence is no measure of how an image looks, and saying so beats a number that means nothing.

    Deterministic and blind to order: position bias and self-consistency come out perfect.
    """

    recorded_as: ClassVar[str] = "dirotq.judging.reader.ReaderJudge"
    reader: AttributeJudge | None

    def __post_init__(self) -> None:
        if self.reader is None:
            raise ConfigError(
                "judge=attributes needs an attribute reader and prompts.reader is null: these "
                "prompts are judged by a vision-language model, with judge=openai or judge=local"
            )

    @property
    def name(self) -> str:
        return "attribute reader"

    @property
    def concurrency(self) -> int:
        return 1

    def check(self) -> None:
        """Raise ConfigError if there is no reader in its folder."""
        assert self.reader is not None
        self.reader.identity()

    @contextmanager
    def open(self, rubric: Rubric, stop: threading.Event) -> Iterator[Compare]:
        reader = self.reader
        assert reader is not None

        def shown(pair: Pair, image: Tensor) -> float:
            """Share of what the caption says that the image shows, mean over kinds."""
            return reader.totals(reader.counts(image[None], [pair.prompt]))["mean"]

        def compare(pair: Pair, corrections: Sequence[Correction]) -> Reply:
            first, second = shown(pair, pair.first), shown(pair, pair.second)
            verdict = "tie" if first == second else "A" if first > second else "B"
            reasons = f"A shows {first:.1%} of the captioned attributes, B {second:.1%}"
            answer = {
                "perceptual_quality": {
                    "reasons": "an attribute reader does not see quality",
                    "verdict": "tie",
                },
                "prompt_alignment": {"reasons": reasons, "verdict": verdict},
            }
            return Reply(json.dumps(answer))

        yield compare
