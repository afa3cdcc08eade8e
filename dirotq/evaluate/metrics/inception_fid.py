"""Inception FID as clean-fid computes it (Parmar, Zhang and Zhu 2022, mode "clean")."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dirotq.errors import ConfigError
from dirotq.evaluate.distributions import frechet_distance
from dirotq.evaluate.png import eight_bits
from dirotq.files.digest import input_digests
from dirotq.files.walk import walk
from dirotq.pipeline.stage import fingerprint
from dirotq.progress import track

from .weights import digests, local_file, local_folder

SIDE = 299
WHAT = "the TorchScript inception-2015-12-05.pt of the StyleGAN3 release, which clean-fid uses"
TRUTH = "a folder of images"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, kw_only=True)
class InceptionFid:
    """Of a whole set, lower is closer: to the 16-bit images, or to a folder of real ones.

    ``path``          the TorchScript network
    ``ground_truth``  folder of images (searched through, links too), or None for the 16-bit images
    ``batch``         images per forward of the network
    """

    path: str
    ground_truth: str | None
    batch: int

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError(f"fid: batch={self.batch}: use at least 1")

    @property
    def paired(self) -> bool:
        return self.ground_truth is None

    def check(self) -> None:
        local_file("fid", self.path, WHAT)
        self._truth()

    def identity(self) -> dict[str, Any]:
        file = local_file("fid", self.path, WHAT)
        found: dict[str, Any] = {"metric": "clean-fid 1", "weights": input_digests([file])[file]}
        if self.ground_truth is not None:
            # The bytes of every image: which files they lie in changes nothing.
            root = local_folder("fid", self.ground_truth, TRUTH)
            found["ground_truth"] = fingerprint(sorted(digests(root, self._truth()).values()))
        return found

    def open(self, device: torch.device) -> "_Meter":
        network = torch.jit.load(local_file("fid", self.path, WHAT), map_location=device).eval()
        meter = _Meter(network, device, self.batch)
        if self.ground_truth is not None:
            for file in track(self._truth(), "FID: ground truth"):
                pixels = np.asarray(Image.open(file).convert("RGB"))
                meter.look_at(pixels)
            meter.truth_MF = meter.take()
        return meter

    def _truth(self) -> list[Path]:
        if self.ground_truth is None:
            return []
        root = local_folder("fid", self.ground_truth, TRUTH)
        files = [path for path in walk(root) if path.suffix.lower() in SUFFIXES]
        if len(files) < 2:
            raise ConfigError(
                f"fid: {self.ground_truth} holds {len(files)} images ({', '.join(SUFFIXES)}); "
                "FID needs two at least, and thousands to say something"
            )
        return files


class _Meter:
    """N images of the set, M of what it is compared with, F features."""

    def __init__(self, network: Any, device: torch.device, batch: int) -> None:
        self.network, self.device, self.batch = network, device, batch
        self.waiting: list[Tensor] = []
        self.features: list[Tensor] = []
        self.truth_MF: Tensor | None = None

    def update(self, images: Tensor, prompts: Sequence[str], original: Tensor) -> None:
        sets = (images, original) if self.truth_MF is None else (images,)
        for image in zip(*sets, strict=True):
            for x in image:  # the image, then its original
                self.look_at(eight_bits(x))

    def look_at(self, pixels: np.ndarray) -> None:
        """Take one image, uint8 [H, W, 3]."""
        self.waiting.append(clean_resize(pixels))
        if len(self.waiting) == self.batch:
            self._forward()

    def take(self) -> Tensor:
        """Return features of everything looked at since the last call, float32 [N, F]."""
        if self.waiting:
            self._forward()
        features, self.features = self.features, []
        return torch.cat(features)

    def compute(self) -> float:
        features = self.take()
        if self.truth_MF is not None:
            return frechet_distance(features, self.truth_MF)
        return frechet_distance(features[::2], features[1::2])

    @torch.no_grad()
    def _forward(self) -> None:
        batch = torch.stack(self.waiting).to(self.device)
        # clean-fid calls the layers behind the network's own resizing.
        made = self.network.layers((batch - 128) / 128)
        self.features.append(made.flatten(1).float().cpu())
        self.waiting = []


def clean_resize(pixels: np.ndarray) -> Tensor:
    """Resize uint8 [H, W, 3] to float32 [3, 299, 299] in [0, 255].

    PIL's bicubic with antialiasing, each channel in float (Parmar et al., section 3).
    """
    channels = [
        np.asarray(
            Image.fromarray(pixels[..., c].astype(np.float32), mode="F").resize(
                (SIDE, SIDE), Image.Resampling.BICUBIC
            )
        )
        for c in range(3)
    ]
    return torch.from_numpy(np.stack(channels).clip(0, 255))
