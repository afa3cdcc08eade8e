"""ImageReward (Xu et al. 2023): what people would prefer, as a trained reward model guesses."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dirotq.files.digest import input_digests

from .inception_fid import eight_bits
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

    def open(self, device: torch.device) -> "_Meter":
        package = imported("image_reward", PACKAGE, INSTALL)
        weights, config = map(str, self._files())
        return _Meter(package.load(weights, device=str(device), med_config=config))

    def _files(self) -> list[Path]:
        pairs = ((self.path, WHAT), (self.config, CONFIG))
        return [local_file("image_reward", path, what) for path, what in pairs]


class _Meter:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.values: list[float] = []

    @torch.no_grad()
    def update(self, images: Tensor, prompts: Sequence[str], original: Tensor) -> None:
        for prompt, image in zip(prompts, images, strict=True):
            picture = Image.fromarray(eight_bits(image))
            self.values.append(float(self.model.score(prompt, picture)))

    def compute(self) -> list[float]:
        values, self.values = self.values, []
        return values
