"""A row of the table of tiny transformers: a class's configuration, and the arguments of a call."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from tiny_families import HEADS, ROPE, TOKENS, randomize
from torch import Tensor, nn

from dirotq.models.call import Call

WIDTH, TEXT, POOLED = 64, 48, 16
FRACTIONS, STEPS = torch.tensor([0.3, 0.7]), torch.tensor([300, 700])
SMALL = {**HEADS, "num_layers": 2}
LATENT = {"in_channels": 4, "out_channels": 4}
AXES = {"axes_dims_rope": ROPE}

__all__ = ["AXES", "FRACTIONS", "HEADS", "LATENT", "POOLED", "ROPE", "SMALL", "STEPS", "TEXT"]
__all__ += ["TOKENS", "WIDTH", "Row", "call", "flag", "mask", "random", "wide"]


@dataclass(frozen=True)
class Row:
    """A class.

    ``inputs``   arguments of one call, for two samples where the class takes several
    ``lacking``  what the class's own defaults lack to be a configuration
    """

    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    lacking: dict[str, Any] = field(default_factory=dict)

    def build(self, name: str) -> Any:
        """Make the transformer, random, in float64 and eval mode."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = getattr(diffusers, name)(**self.config)
            for parameter in made.parameters():
                if parameter.ndim == 3:  # stacked experts, which a class may leave empty
                    nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        for module in made.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(_widened)
        return randomize(made).double()


def wide(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments in float64."""
    call = Call((), inputs).map(lambda t: t.double() if t.is_floating_point() else t)
    return call.kwargs


def _widened(linear: Any, args: tuple[Any, ...]) -> Any:
    # Some classes say float32 where they mean "not 16 bits".
    return (args[0].to(linear.weight.dtype), *args[1:]) if args else None


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def mask(*lengths: int) -> Tensor:
    """Text masks of prompts as long as that."""
    return (torch.arange(TOKENS) < torch.tensor(lengths)[:, None]).long()


def flag(*lengths: int) -> Tensor:
    return mask(*lengths).bool()


def call(*size: int, time: Tensor = STEPS, text: int = TEXT, **more: Any) -> dict[str, Any]:
    """Arguments of one call for two images or clips."""
    start = {"hidden_states": random(2, *size), "timestep": time}
    return start | {"encoder_hidden_states": random(2, TOKENS, text)} | more
