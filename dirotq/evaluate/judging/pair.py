"""What a judge is shown: a pair of images, and what was wrong with its earlier answers."""

from dataclasses import dataclass

from torch import Tensor

from dirotq.sources.prompts import Prompt


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
