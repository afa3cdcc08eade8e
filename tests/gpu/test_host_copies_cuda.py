"""Forwards that make values on the host, recorded into real CUDA graphs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import TINY
from torch import Tensor, nn

from dirotq.kernels.chip import say_once
from dirotq.runtime.graphs import graph_forward, ungraph_forward

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


class Forward(nn.Module):
    """A network of one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _indexed(x: Tensor) -> Tensor:
    x = x.clone()
    x[[0, 2]] = 5.0
    x[:, torch.tensor([1, 3])] = torch.tensor(0.5)
    x[1, 1] = 0.75
    x[x > 4.5] = -1.0
    x[0] = torch.tensor(0.25)
    return x[:, [3, 2, 1, 0]] + x[torch.arange(4).flip(0)]


def _written(x: Tensor) -> Tensor:
    table = torch.arange(4.0).to(x.device)
    table += 1  # a table of its own in every replay
    return x * table


MAKE: dict[str, Callable[[Tensor], Tensor]] = {
    "to": lambda x: x + torch.arange(4.0).cos().to(x.device),
    "to, converted and pinned": lambda x: (
        x + torch.arange(4).pin_memory().to(x.device, x.dtype, non_blocking=True)
    ),
    "cuda": lambda x: x + torch.arange(4.0).cuda(),
    "tensor": lambda x: x + torch.tensor([1.0, 2, 3, 4], device=x.device),
    "tensor of the current device": lambda x: x + torch.tensor([[1.0]], device="cuda"),
    "as_tensor of a number": lambda x: torch.where(x > 0, torch.as_tensor(5, device=x.device), x),
    "new_tensor": lambda x: x + x.new_tensor([1, 2, 3, 4]),
    "where": lambda x: torch.where(x > 0, torch.tensor(5.0), x),
    "numpy": lambda x: x + torch.from_numpy(np.linspace(0, 1, 4)).to(x),
    "copy_": lambda x: torch.empty_like(x).copy_(torch.ones(4, 4).triu()) * x,
    "complex": lambda x: x * torch.polar(torch.ones(4), torch.arange(4.0)).to(x.device).real,
    "a number of the host": lambda x: x * torch.tensor(2.5),
    "indices": _indexed,
    "written to": _written,
}


def inputs(seed: int) -> Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)).cuda()


def recorded_graphs(network: Any) -> int:
    return sum(graph is not None for graph in network.forward.calls.values())


@pytest.fixture(autouse=True)
def say_again():
    say_once.cache_clear()


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values_of_the_host_are_recorded(make, mode):
    network = Forward(make)
    graph_forward(network)
    with mode():
        for seed in range(5):
            got = network(inputs(seed))
            torch.empty(2**20, device="cuda").fill_(torch.nan)  # over whatever was given back
            assert torch.equal(got, make(inputs(seed))), seed
    assert recorded_graphs(network) == 1


def _read_back(x: Tensor) -> Tensor:
    return x + x.sum().item()


def _changing(x: Tensor) -> Tensor:
    return x + 0 * torch.rand(4).to(x.device)


def _masked(x: Tensor) -> Tensor:
    return x + x[x > 0].sum()


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (_read_back, "aten._local_scalar_dense.default reads values of the device back"),
        (_masked, "aten.index.Tensor reads values of the device back"),
        (lambda x: x.cpu().cuda() + 1, "aten._to_copy.default reads values of the device back"),
        (_changing, "values that it makes on the host change from call to call"),
    ],
)
def test_what_can_not_be_recorded_is_named(caplog, trouble, reason):
    good, bad = Forward(MAKE["tensor"]), Forward(trouble)
    for network in (good, bad):
        graph_forward(network)
    stream = torch.cuda.current_stream()
    with torch.no_grad():
        for seed in range(4):
            assert torch.equal(bad(inputs(seed)), trouble(inputs(seed)))
            assert torch.cuda.current_stream() == stream
            assert torch.randn(8, device="cuda").isfinite().all()
            assert torch.equal(good(inputs(seed)), MAKE["tensor"](inputs(seed)))
    assert f"recording it failed ({reason}" in caplog.text
    assert (recorded_graphs(good), recorded_graphs(bad)) == (1, 0)
    assert not torch._C._len_torch_dispatch_stack()
    assert not torch._C._only_lift_cpu_tensors()


@torch.library.custom_op("dirotq_tests::waits", mutates_args=())
def waits(x: Tensor) -> Tensor:
    return x + x.sum().item()  # within an operator, where no mode looks


def test_an_operator_that_fails_in_the_capture_is_named(caplog):
    network = Forward(lambda x: waits(x) * 2)
    graph_forward(network)
    with torch.no_grad():
        for seed in range(3):
            assert torch.equal(network(inputs(seed)), 2 * waits(inputs(seed)))
            assert torch.randn(8, device="cuda").isfinite().all()
    assert "recording it failed" in caplog.text
    assert "in dirotq_tests.waits.default" in caplog.text


def test_a_remembered_table_outlives_its_cache():
    """The network forgets its table; the graph still reads it."""
    tables: dict[int, Tensor] = {}

    def remembers(x: Tensor) -> Tensor:
        if len(x) not in tables:
            tables.clear()
            tables[len(x)] = torch.arange(4.0).to(x.device) + len(x)
        return x + tables[len(x)]

    network = Forward(remembers)
    graph_forward(network)
    with torch.no_grad():
        for seed in range(3):
            network(inputs(seed))
        tables.clear()
        held = [torch.full((4,), torch.nan, device="cuda") for _ in range(64)]
        table = torch.arange(4.0).cuda() + 4
        for seed in range(3):
            assert torch.equal(network(inputs(seed)), inputs(seed) + table)
    assert recorded_graphs(network) == 1
    assert held


QWEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "edited images": {"zero_cond_t": True},
    "layers": {"use_layer3d_rope": True},
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("config", QWEN.values(), ids=QWEN)
def test_qwen_image(config, compiled):
    """Text lengths and modulation indices of the host, and tables cached by shape."""
    network = TINY["qwen_image"].build(**config).cuda()
    original = network.forward
    if compiled:
        torch.compiler.reset()
        for block in network.transformer_blocks:
            block.compile()
    graph_forward(network)
    call = TINY["qwen_image"].inputs() | {"return_dict": False}
    call = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in call.items()}
    with torch.no_grad():
        for seed in range(4):
            draw = torch.Generator().manual_seed(seed)
            call["hidden_states"] = torch.randn(2, 9, 16, generator=draw).cuda()
            call["timestep"] = torch.rand(2, generator=draw).cuda()
            torch.testing.assert_close(network(**call)[0], original(**call)[0])
    assert recorded_graphs(network) == 1
    ungraph_forward(network)
