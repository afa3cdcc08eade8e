"""Several denoisers in the memory of one: each is read from disk when its turn comes.

Wan 2.2's experts serve one after the other: two reads for a generation are the price of half of the
memory.
"""

import logging
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

from dirotq.device import give_back
from dirotq.errors import UnsupportedError
from dirotq.models.denoisers import denoisers_of
from dirotq.models.skeleton import assign, drop, move_buffers
from dirotq.pipeline.machine import free_ram

from .opening import SHARE, module_bytes
from .weights import Weights

log = logging.getLogger(__name__)

Move = Callable[[nn.Module], object]


class Turns:
    """Modules of which one at a time, the last that ran, is on ``device``.

    ``come`` is called with a module before it runs, ``go`` with it before another one comes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._go: Move = _stay
        # A module knows its hooks: if these knew it, it would stay until garbage is collected.
        self._last: weakref.ref[nn.Module] = weakref.ref(nn.Module())

    def add(self, module: nn.Module, come: Move, go: Move) -> None:
        """Let ``module`` take turns, by calls of its ``forward``."""
        module.register_forward_pre_hook(lambda one, _: self.take(one, come, go))

    def add_component(self, module: nn.Module) -> None:
        """Let a component of a pipeline take turns, by all of its methods; it waits on the CPU."""
        add_hook_to_module(module, _Called(self))

    def take(self, module: nn.Module, come: Move, go: Move) -> None:
        """Let ``module`` come, unless it is there."""
        last = self._last()
        if last is module:
            return
        if last is not None:
            self._go(last)
            give_back(self.device)
        come(module)
        self._last, self._go = weakref.ref(module), go


def _stay(_: nn.Module) -> None:
    """Leave a module where it is."""


class _Called(ModelHook):
    """What a module's ``forward`` calls first and, by diffusers, ``encode`` and ``decode``."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.execution_device = turns, turns.device

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        there = self.turns.device
        self.turns.take(module, lambda one: one.to(there), lambda one: one.to("cpu"))
        return args, kwargs


def take_turns(
    parts: Mapping[str, nn.Module], weights: Mapping[str, Weights], dtype: torch.dtype, turns: Turns
) -> None:
    """Let denoisers that have no weights yet take turns; they wait on the disk."""

    def read(stored: Weights, own: list[str], module: nn.Module) -> None:
        there = module.state_dict().keys()  # packed linears may have taken the places of others
        stored.fill(module, [name for name in own if name in there], turns.device, dtype)
        move_buffers(module, turns.device)

    for part, module in parts.items():
        own = list(module.state_dict())
        turns.add(module, partial(read, weights[part], own), partial(drop, names=own))


def share_memory(
    parts: Mapping[str, nn.Module],
    weights: Mapping[str, Weights],
    dtype: torch.dtype,
    turns: Turns,
    keep: Callable[[Tensor], Tensor],
) -> None:
    """Read denoisers to where ``keep`` puts them; several take turns in that memory.

    For what holds on to the memory of a module, such as diffusers' group offloading.

    Raises UnsupportedError for several denoisers whose shapes differ.
    """
    first, *others = parts
    held: dict[str, Tensor] = {}

    def read(stored: Weights, module: nn.Module) -> None:
        if turns.device.type == "cuda":
            torch.cuda.synchronize(turns.device)  # nothing is on its way from there
        for name, tensor in stored.read(module, held, "cpu", dtype):
            held[name].copy_(tensor)

    names = list(parts[first].state_dict())
    weights[first].fill(parts[first], names, turns.device, dtype, keep=keep)
    held |= parts[first].state_dict()
    for part in others:
        shapes = {name: tensor.shape for name, tensor in parts[part].state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in held.items()}:
            raise UnsupportedError(
                f"{first} and {part} are of different shapes, and one alone is too large for the "
                "GPU memory to stay within: give more (capture.vram)"
            )
        for name, tensor in held.items():
            path, _, leaf = name.rpartition(".")
            assign(parts[part].get_submodule(path), leaf, tensor)
    for part in parts if others else ():
        turns.add(parts[part], partial(read, weights[part]), _stay)


def bring(
    pipe: Any, weights: Mapping[str, Weights], dtype: torch.dtype, device: torch.device
) -> None:
    """Give a hollow pipeline's denoisers their weights, and put the other components in place.

    On their way to a GPU, denoisers are never whole in host memory. They stay on the device if it
    has room for all of them; else they take turns. Where a GPU does not even hold one of them
    beside all other components, these take turns too, and wait in host memory.
    """
    parts = denoisers_of(pipe)
    others = [
        module
        for name, module in pipe.components.items()
        if isinstance(module, nn.Module) and name not in parts
    ]
    room, each = SHARE * free_memory(device), list(map(module_bytes, parts.values()))
    beside = sum(map(module_bytes, others)) if device.type == "cuda" else 0  # else they are there
    crowded = device.type == "cuda" and beside + max(each) > room
    if not crowded:
        for module in others:
            module.to(device)
    if beside + sum(each) <= room:
        for part, module in parts.items():
            weights[part].fill(module, list(module.state_dict()), device, dtype)
            move_buffers(module, device)
        return
    turns = Turns(device)
    take_turns(parts, weights, dtype, turns)
    for module in others if crowded else []:
        turns.add_component(module)
    told = "components" if crowded else " and ".join(parts)
    log.info("the pipeline's %s take turns on %s, which can't hold all", told, device)


def free_memory(device: torch.device) -> int:
    """Count the bytes that are free where ``device`` computes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_ram()
