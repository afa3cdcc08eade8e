"""Metrics that need somebody's trained network, from local weight files (docs/metrics.md).

One file per metric. Each is a frozen dataclass of settings that ``validate.learned`` names; its
packages and weights are looked for when a run is planned and loaded when it scores.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Meter(Protocol):
    """A metric at work on one set of images, then on the next."""

    def update(self, images: Tensor, prompts: Sequence[str], original: Tensor) -> None:
        """Look at images [B, 3, H, W] in [0, 1]; ``original``: the 16-bit model's, same order."""

    def compute(self) -> list[float] | float:
        """Return scores of all images since the last call, or one of the set; start over."""


class Metric(Protocol):
    """What ``validate.learned`` holds.

    ``paired``  it compares with the 16-bit images, so these have no score of their own
    """

    @property
    def paired(self) -> bool: ...

    def check(self) -> None:
        """Raise ConfigError if a package or a file is missing."""

    def identity(self) -> dict[str, Any]:
        """Return settings, and the digests of the weights. Raises what :meth:`check` raises."""

    def open(self, device: torch.device) -> Meter:
        """Load its network to ``device``."""


class PerImage:
    """A meter of what ``score`` says of images, prompts and originals: one number per image."""

    def __init__(self, score: Callable[[Tensor, Sequence[str], Tensor], list[float]]) -> None:
        self.score = score
        self.values: list[float] = []

    @torch.no_grad()
    def update(self, images: Tensor, prompts: Sequence[str], original: Tensor) -> None:
        self.values += self.score(images, prompts, original)

    def compute(self) -> list[float]:
        values, self.values = self.values, []
        return values
