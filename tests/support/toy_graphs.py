"""A small network behind graphs that a CPU can record: replays call what was recorded."""

import logging
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from dirotq.kernels.chip import say_once
from dirotq.runtime.graphs import graph_forward


class Again:
    """Replays by calling again; its result lies in the same tensors each time, as a graph's."""

    device_type: ClassVar[str] = "cpu"
    captures: ClassVar[int] = 0
    replays: ClassVar[int] = 0
    fail: ClassVar[Exception | None] = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @staticmethod
    def busy() -> bool:
        return False

    def capture(self, run: Any, owned: Any) -> Any:
        if Again.fail is not None:
            raise Again.fail
        Again.captures += 1
        with torch.inference_mode(False), torch.no_grad():
            static = torch.utils._pytree.tree_map_only(Tensor, torch.clone, run())

        def replay() -> Any:
            Again.replays += 1
            flat, fresh = (torch.utils._pytree.tree_leaves(x) for x in (static, run()))
            for old, new in zip(flat, fresh, strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)
            return static

        return replay

    def turn(self) -> Any:
        return nullcontext()

    def settle(self) -> None:
        pass

    def reserved(self) -> int:
        return 7


@pytest.fixture(autouse=True)
def fresh():
    Again.captures = Again.replays = 0
    Again.fail = None
    say_once.cache_clear()


class Toy(nn.Module):
    """A block and a linear; ``runs`` counts how often Python went through the forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4))
        self.runs = 0

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Any = None,
        *,
        joint_attention_kwargs: dict[str, Any] | None = None,
        more: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """Documented."""
        self.runs += 1
        y = self.block(hidden_states) + self.shift
        if timestep is not None:
            y = y * timestep
        for extra in more or ():
            y = y + extra
        return Transformer2DModelOutput(sample=y) if return_dict else (y, None)


def toy(limit: int = 4) -> Any:
    network = Toy().eval()
    graph_forward(network, limit=limit, recorder=Again)
    return network


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def run(network: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return network(*args, **kwargs)


def recorded(network: Any, *args: Any, **kwargs: Any) -> None:
    """Make a call until it is recorded."""
    for _ in range(2):
        run(network, *args, **kwargs)


def why_eager(caplog: Any, network: Any, *args: Any, **kwargs: Any) -> str:
    """Make a call twice, hold it against the plain network, and return what was logged."""
    before = Again.captures, Again.replays
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            run(network, *args, **kwargs)
    assert (Again.captures, Again.replays) == before
    (line,) = {record.getMessage() for record in caplog.records if "CUDA graph" in record.message}
    return line
