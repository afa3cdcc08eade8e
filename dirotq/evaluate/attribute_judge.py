"""The embedded model's judge: does an image show what its caption says?"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dirotq.errors import ConfigError
from dirotq.files.digest import file_digest
from dirotq.sources.prompts import Prompt, resolve

from .attribute_reader import AttributeReader, caption_counts, total_accuracy


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

    def features(self, images: Tensor) -> Tensor:
        """Return features for FID and KID of images [B, 3, 128, 128]: [B, F] on the CPU."""
        return self._network(images).features(images).cpu()

    def counts(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Count captioned attributes that each image shows, and how many there are: {kind: [B, 2]}.

        Raises ConfigError if a prompt says nothing about its attributes.
        """
        self.refuse_silent(prompts)
        attributes = [p.attributes for p in prompts if p.attributes is not None]
        return caption_counts(self._network(images), images, attributes)

    def totals(self, counts: Mapping[str, Tensor]) -> dict[str, float]:
        """Return shares over all images of :meth:`counts`, by kind, and their mean."""
        return total_accuracy(counts)

    def refuse_silent(self, prompts: Sequence[Prompt]) -> None:
        """Raise ConfigError if a prompt says nothing about its attributes, or what is unknown."""
        if silent := sum(p.attributes is None for p in prompts):
            raise ConfigError(
                f"{silent} of {len(prompts)} held-out prompts carry no 'attributes', which the "
                "attribute reader needs; set prompts.reader=null"
            )
        network = _load(resolve(self.path), *self.identity().values())
        for prompt in prompts:
            try:
                network.targets([prompt.attributes or {}])
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"the attributes of the held-out prompt {prompt.text!r:.80} are not those that "
                    f"the attribute reader in {self.path} knows ({type(error).__name__} "
                    f"{error!s:.80}); set prompts.reader=null"
                ) from error

    def _network(self, images: Tensor) -> AttributeReader:
        """Load the network to where the images are."""
        network = _load(resolve(self.path), *self.identity().values())
        return network.to(images.device)


@functools.lru_cache(maxsize=2)
def _load(folder: Path, *digests: str) -> AttributeReader:
    """Load once per content (``digests``): images are judged batch by batch."""
    return AttributeReader.load(folder)
