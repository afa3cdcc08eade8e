"""CLIP score (Hessel et al. 2021): how well an image fits its prompt, as a trained CLIP sees it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dirotq.errors import ArtifactError, ConfigError
from dirotq.evaluate.png import eight_bits
from dirotq.files.walk import readable
from dirotq.quiet import quiet
from dirotq.sources.doors import refuse_part
from dirotq.sources.weights import read_header

from . import PerImage
from .weights import digests, local_folder

WHAT = "a transformers CLIP folder, such as a download of openai/clip-vit-large-patch14"


@dataclass(frozen=True, kw_only=True)
class ClipScore:
    """Per image, higher is better: 100 max(cos(image, prompt), 0). Long prompts are cut at the
    model's length (77 tokens).

    ``path``  folder of a CLIP model with its tokenizer and image processor, in safetensors
    """

    path: str

    paired = False

    def check(self) -> None:
        self._files()

    def identity(self) -> dict[str, Any]:
        folder = local_folder("clip_score", self.path, WHAT)
        return {"metric": "clip_score 1", "files": digests(folder, self._files())}

    def open(self, device: torch.device) -> PerImage:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        folder = local_folder("clip_score", self.path, WHAT)
        with quiet():
            model: Any = CLIPModel.from_pretrained(
                folder, use_safetensors=True, local_files_only=True
            )
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        model.eval().requires_grad_(False).to(device)
        length = model.config.text_config.max_position_embeddings

        def score(images: Tensor, prompts: Sequence[str], original: Tensor) -> list[float]:
            words = tokenizer(
                list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt"
            )
            pixels = processor([eight_bits(image) for image in images], return_tensors="pt")
            made = model(**words.to(device), **pixels.to(device))
            # Both embeddings come normalized.
            cosine = (made.image_embeds * made.text_embeds).sum(1)
            return (100 * cosine.clamp_min(0)).tolist()

        return PerImage(score)

    def _files(self) -> list[Path]:
        """List what decides a score: configurations, vocabulary, weights."""
        folder = local_folder("clip_score", self.path, WHAT)
        weights = sorted(folder.glob("*.safetensors"))
        if not weights or not (folder / "config.json").is_file():
            raise ConfigError(
                f"clip_score: {self.path} holds no config.json with *.safetensors; it should be "
                f"{WHAT}, with its weights as safetensors (docs/metrics.md)"
            )
        for file in weights:
            try:
                read_header(file)
            except ArtifactError as error:
                raise ConfigError(f"clip_score: {error}") from error
        refuse_part(folder)
        settings = [*sorted(folder.glob("*.json")), *sorted(folder.glob("*.txt"))]
        return [*weights, *map(readable, settings)]
