"""A small network that reads a generated scene, and so judges whether it matches its caption.

B images, G = 9 grid cells, F features.  Cells and positions are the same thing, row-major.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from torch import Tensor

from dirotq.errors import ArtifactError

KINDS = ("shape", "color", "size", "kind", "color_1", "color_2")
ABSENT = -100  # target of an attribute that does not exist (ignored by cross entropy)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderConfig:
    """The vocabulary a reader was trained on and its channels; written as config.json."""

    shapes: tuple[str, ...]
    colors: tuple[str, ...]
    sizes: tuple[str, ...]
    positions: tuple[str, ...]
    backgrounds: tuple[str, ...]
    channels: tuple[int, ...] = (32, 64, 96, 128, 128)
    side: int = 128


class AttributeReader(nn.Module):
    """Reads shape, color and size per grid cell, and the background's kind and colors."""

    def __init__(self, config: ReaderConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        before = 3
        for i, after in enumerate(config.channels):
            stride = 2 if i < 3 else 1
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.SiLU()]
            before = after
        self.body = nn.Sequential(*layers)
        self.cell_sizes = (1 + len(config.shapes), len(config.colors), len(config.sizes))
        self.cells = nn.Conv2d(before, sum(self.cell_sizes), 1)
        colors = len(config.colors)
        self.background_sizes = (len(config.backgrounds), colors, 1 + colors)
        self.background = nn.Linear(before, sum(self.background_sizes))

    def _maps(self, images: Tensor) -> Tensor:
        side = self.config.side
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise ArtifactError(
                f"attribute reader: images have shape {tuple(images.shape)}, it was trained on "
                f"[B, 3, {side}, {side}]; resize them or judge with another metric"
            )
        return self.body(images * 2 - 1)

    def features(self, images: Tensor) -> Tensor:
        """Return features for FID and KID of images [B, 3, 128, 128] in [0, 1]: [B, F = 128]."""
        return self._maps(images).mean((2, 3))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits for images [B, 3, 128, 128] in [0, 1], classes in dimension 1.

        shape [B, 1 + S, G] with class 0 = nothing there, color [B, C, G], size [B, 2, G],
        kind [B, K], color_1 [B, C], color_2 [B, 1 + C] with class 0 = no second color
        """
        maps = self._maps(images)
        cells = self.cells(nn.functional.adaptive_avg_pool2d(maps, 3)).flatten(2)
        background = self.background(maps.mean((2, 3))).split(self.background_sizes, 1)
        return dict(zip(KINDS, (*cells.split(self.cell_sizes, 1), *background), strict=True))

    def targets(self, attributes: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the class indices that `forward` should give for captioned attributes, int64.

        attributes  {"objects": [{"shape", "color", "size", "position"}],
                     "background": {"kind", "colors"}} per image, as in the prompt files
        returns     shape, color, size [B, G]; kind, color_1, color_2 [B]
        """
        config = self.config
        cells = torch.full((3, len(attributes), len(config.positions)), ABSENT)
        cells[0] = 0
        background = torch.zeros(3, len(attributes), dtype=torch.int64)
        for i, scene in enumerate(attributes):
            for thing in scene["objects"]:
                cell = config.positions.index(thing["position"])
                cells[0, i, cell] = 1 + config.shapes.index(thing["shape"])
                cells[1, i, cell] = config.colors.index(thing["color"])
                cells[2, i, cell] = config.sizes.index(thing["size"])
            colors = [config.colors.index(color) for color in scene["background"]["colors"]]
            background[0, i] = config.backgrounds.index(scene["background"]["kind"])
            background[1, i] = colors[0]
            background[2, i] = 1 + colors[1] if len(colors) > 1 else 0
        return dict(zip(KINDS, (*cells, *background), strict=True))

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors (float16) into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        weights = {k: v.detach().half().cpu().contiguous() for k, v in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "AttributeReader":
        """Read what `save` wrote; the reader comes in float32 on the CPU, in eval mode.

        Raises ArtifactError when a file is missing or doesn't fit.
        """
        try:
            fields = json.loads((folder / "config.json").read_text())
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            reader = cls(ReaderConfig(**fields))
            weights = load_file(folder / "model.safetensors")
            reader.load_state_dict({k: v.float() for k, v in weights.items()})
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise ArtifactError(
                f"attribute reader in {folder}: {error}; expected config.json and "
                "model.safetensors as written by assets/train_tiny_flux.py"
            ) from error
        return reader.eval().requires_grad_(False)


def caption_accuracy(
    reader: AttributeReader,
    images: Tensor,
    attributes: Sequence[Mapping[str, Any]],
    *,
    batch: int = 128,
) -> dict[str, float]:
    """Measure how much of what the captions promise is in the images, as fractions in [0, 1].

    images      float, [B, 3, 128, 128] in [0, 1]
    attributes  what each caption says, as in the prompt files
    returns     see :func:`total_accuracy`
    """
    return total_accuracy(caption_counts(reader, images, attributes, batch=batch))


@torch.no_grad()
def caption_counts(
    reader: AttributeReader,
    images: Tensor,
    attributes: Sequence[Mapping[str, Any]],
    *,
    batch: int = 128,
) -> dict[str, Tensor]:
    """Count what each image shows of what its caption promises, and how much that is.

    Returns {kind: [B, 2]}, float64.

    Arguments as of :func:`caption_accuracy`. Kinds are shape, color and size (of the captioned
    objects, at the captioned cell; an object that isn't there counts as wrong), position (1 if
    there are objects at exactly the captioned cells) and background (1 for the right kind and
    colors).
    """
    if len(images) != len(attributes):
        raise ArtifactError(
            f"caption accuracy: {len(images)} images for {len(attributes)} captions; "
            "give one image per caption"
        )
    device = next(reader.parameters()).device
    parts: list[dict[str, Tensor]] = []
    for chunk in images.split(batch):
        logits = reader(chunk.to(device, torch.float32))
        parts.append({name: values.argmax(1).cpu() for name, values in logits.items()})
    read = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    target = reader.targets(attributes)

    there = target["shape"] > 0
    seen = read["shape"] > 0
    right: dict[str, Tensor] = {}
    for name in ("shape", "color", "size"):
        hits = (read[name] == target[name]) & seen & there
        right[name] = torch.stack([hits.sum(1), there.sum(1)], 1)
    background = torch.stack([read[n] == target[n] for n in ("kind", "color_1", "color_2")])
    for name, hit in (("position", (there == seen).all(1)), ("background", background.all(0))):
        right[name] = torch.stack([hit, torch.ones_like(hit)], 1)
    return {name: count.double() for name, count in right.items()}


def total_accuracy(counts: Mapping[str, Tensor]) -> dict[str, float]:
    """Return shares over all images of :func:`caption_counts`, by kind, and their mean."""
    sums = {name: count.sum(0) for name, count in counts.items()}
    right = {name: float(hits / promised) for name, (hits, promised) in sums.items()}
    return right | {"mean": sum(right.values()) / len(right)}
