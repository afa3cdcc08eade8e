"""Packed networks with random adapters on every packed linear, and a recorder for them."""

from typing import Any
from unittest import mock

import pytest
import tiny_offload
import torch
from torch import nn
from toy_graphs import Again

from dirotq.kernels.linear import PointwiseView, QuantLinear, SiteView, rows_of
from dirotq.kernels.updates import Updates
from dirotq.packed.guards import guard

peft = pytest.importorskip("peft")

RANK = 3


def linears(made: nn.Module) -> dict[str, Any]:
    """Packed modules that stand where the network had a linear."""
    read = {id(rows_of(m)[0]) for m in made.modules() if isinstance(m, SiteView | PointwiseView)}
    return {
        name: module
        for name, module in made.named_modules()
        if isinstance(module, SiteView | PointwiseView)
        or (isinstance(module, QuantLinear) and id(module) not in read)
    }


def config(made: nn.Module, *names: str, **more: Any) -> Any:
    targets = names or tuple(linears(made))
    return peft.LoraConfig(r=RANK, target_modules=list(targets), init_lora_weights=False, **more)


def adapted(name: str = "flux", *adapters: str, seed: int = 0) -> Any:
    """A guarded packed network with random adapters on every packed linear."""
    made = tiny_offload.network(name)
    guard(made)
    torch.manual_seed(seed)
    chosen = config(made, lora_alpha=6)
    for adapter in adapters or ("one",):
        if hasattr(made, "add_adapter"):
            made.add_adapter(chosen, adapter)
        else:  # no class of diffusers' with adapters
            peft.inject_adapter_in_model(chosen, made, adapter)
    return made.eval()


def set_adapters(made: nn.Module, names: list[str], weights: list[float]) -> None:
    for layer in layers(made):
        layer.set_adapter(names)
        for name, weight in zip(names, weights, strict=True):
            layer.set_scale(name, weight)


def layers(made: nn.Module) -> list[Any]:
    return [m for m in made.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


class Fixed(Again):
    """Replays as a CUDA graph does: on the directions that lie there."""

    def capture(self, run: Any, owned: Any) -> Any:
        replay = super().capture(run, owned)

        def fixed() -> Any:
            with mock.patch.object(Updates, "renew", lambda *_: None):
                return replay()

        return fixed
