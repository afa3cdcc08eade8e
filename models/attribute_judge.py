"""The embedded model's judge: does an image show what its caption says?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dirotq.digest import file_digest
from dirotq.errors import ConfigError
from dirotq.prompts import Prompt, resolve

from .attribute_reader import AttributeReader, caption_accuracy


@dataclass(frozen=True, kw_only=True)
class AttributeJudge:
    """An attribute reader in a folder (config.json, model.safetensors)."""

    path: str

    def identity(self) -> dict[str, Any]:
        folder = resolve(self.path)
        if not (folder / "model.safetensors").is_file():
            raise ConfigError(
                f"prompts.reader.path={self.path} holds no attribute reader (config.json and "
                "model.safetensors); set prompts.reader=null to go without"
            )
        return {
            p.name: file_digest(p) for p in (folder / "config.json", folder / "model.safetensors")
        }

    def accuracy(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Share of captioned attributes that images [B, 3, H, W] in [0, 1] show, by kind and mean.

        Raises ConfigError if a prompt says nothing about its attributes.
        """
        attributes = [p.attributes for p in prompts if p.attributes is not None]
        if len(attributes) < len(prompts):
            raise ConfigError(
                f"{len(prompts) - len(attributes)} of {len(prompts)} held-out prompts carry no "
                "'attributes', which the attribute reader needs; set prompts.reader=null"
            )
        return caption_accuracy(AttributeReader.load(resolve(self.path)), images, attributes)
