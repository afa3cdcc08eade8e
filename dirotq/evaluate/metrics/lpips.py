"""LPIPS (Zhang et al. 2018): distance to the 16-bit image in a trained network's features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dirotq.errors import ConfigError
from dirotq.files.digest import input_digests

from . import PerImage
from .weights import imported, local_file, refuse_missing

PACKAGE, INSTALL = "lpips", "'dirotq[metrics]'"
WHAT = "a safetensors file with torchvision's features of that network"
NETS = ("alex", "vgg")


@dataclass(frozen=True, kw_only=True)
class Lpips:
    """Per image, lower is closer; the package's own heads (version 0.1), images scaled to [-1, 1].

    ``path``  state dict of torchvision's AlexNet or VGG-16 (``features.0.weight``, ...)
    ``net``   ``alex`` (as papers report it) or ``vgg``
    """

    path: str
    net: str

    paired = True

    def __post_init__(self) -> None:
        if self.net not in NETS:
            raise ConfigError(f"lpips: net={self.net} is unknown; use {' or '.join(NETS)}")

    def check(self) -> None:
        refuse_missing("lpips", PACKAGE, INSTALL)
        local_file("lpips", self.path, WHAT)

    def identity(self) -> dict[str, Any]:
        file = local_file("lpips", self.path, WHAT)
        return {"metric": "lpips 1", "net": self.net, "weights": input_digests([file])[file]}

    def open(self, device: torch.device) -> PerImage:
        package = imported("lpips", PACKAGE, INSTALL)
        # Without pnet_rand the backbone would be downloaded; the heads come with the package.
        network = package.LPIPS(net=self.net, pnet_rand=True, verbose=False)
        _fill(network.net, load_file(local_file("lpips", self.path, WHAT)), self.path)
        network.eval().requires_grad_(False).to(device)

        def score(images: Tensor, prompts: Sequence[str], original: Tensor) -> list[float]:
            a, b = (2 * x.to(device) - 1 for x in (images, original))
            return network(a, b).flatten().tolist()

        return PerImage(score)


def _fill(backbone: torch.nn.Module, weights: dict[str, Tensor], path: str) -> None:
    """Load weights by torchvision's layer numbers: ``slice2.3.weight`` is features.3."""
    wanted = backbone.state_dict()
    found = {name: weights.get(f"features.{name.partition('.')[2]}") for name in wanted}
    for name, tensor in found.items():
        if tensor is None or tensor.shape != wanted[name].shape:
            raise ConfigError(
                f"lpips: {path} has no features.{name.partition('.')[2]} of shape "
                f"{tuple(wanted[name].shape)}; it should be {WHAT} (docs/metrics.md)"
            )
    backbone.load_state_dict(found)
