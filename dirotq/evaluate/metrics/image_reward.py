"""ImageReward (Xu et al. 2023): what people would prefer, as a trained reward model guesses."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dirotq.evaluate.png import picture
from dirotq.files.digest import input_digests

from . import PerImage
from .weights import imported, local_file, refuse_missing

PACKAGE, INSTALL = "ImageReward", "image-reward"
WHAT = "ImageReward.pt of the repository THUDM/ImageReward"
CONFIG = "med_config.json of the same repository"


@dataclass(frozen=True, kw_only=True)
class ImageReward:
    """Per image, higher is better; its zero is arbitrary.

    ``path``, ``config``  ImageReward.pt and med_config.json. The package reads the former itself,
                          by unpickling: use a file you trust. It also looks for the tokenizer of
                          bert-base-uncased in the Hugging Face cache.
    """

    path: str
    config: str

    paired = False

    def check(self) -> None:
        refuse_missing("image_reward", PACKAGE, INSTALL)
        self._files()

    def identity(self) -> dict[str, Any]:
        return {"metric": "image_reward 1", "files": list(input_digests(self._files()).values())}

    def open(self, device: torch.device) -> PerImage:
        package = imported("image_reward", PACKAGE, INSTALL)
        weights, config = map(str, self._files())
        model = package.load(weights, device=str(device), med_config=config)

        def score(images: Tensor, prompts: Sequence[str], original: Tensor) -> list[float]:
            shown = zip(prompts, map(picture, images), strict=True)
            return [float(model.score(prompt, image)) for prompt, image in shown]

        return PerImage(score)

    def _files(self) -> list[Path]:
        pairs = ((self.path, WHAT), (self.config, CONFIG))
        return [local_file("image_reward", path, what) for path, what in pairs]
