"""Calls and networks that are not recorded, and changes that drop what was."""

import copy
import logging
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from toy_graphs import (
    Again,
    Toy,
    fresh,  # noqa: F401
    recorded,
    rows,
    run,
    toy,
    why_eager,
)

from dirotq.kernels.chip import say_once
from dirotq.runtime.graphs import GraphedForward, graph_forward, ungraph_forward


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_tensors(mode):
    network = toy()
    for turn in (torch.inference_mode, mode, torch.no_grad, torch.inference_mode):
        with turn():
            x = rows(3)
            network(x)
    assert (Again.captures, Again.replays) == (1, 3)


def test_gradients(caplog):
    network = toy()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            network(rows(3)).sample.sum().backward()
    assert network.block.weight.grad is not None
    assert Again.captures == 0
    (record,) = caplog.records  # said once
    assert record.getMessage() == "Toy runs without a CUDA graph: gradients are enabled"


def test_autocast(caplog):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in why_eager(caplog, toy(), rows(3))


def test_other_devices(caplog):
    assert "meta" in why_eager(caplog, toy().to("meta"), rows(3).to("meta"))


def test_strange_arguments(caplog):
    assert "is or holds a range" in why_eager(caplog, toy(), rows(3), more=range(0))


def test_wrong_arguments_meet_the_original():
    with pytest.raises(TypeError, match="unexpected keyword"):
        run(toy(), rows(3), nonsense=1)


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks(caplog, kind):
    network, fired = toy(), []
    recorded(network, rows(3))
    handle = getattr(network.block, kind)(lambda *_: fired.append(1))
    assert "hooks" in why_eager(caplog, network, rows(3))
    assert len(fired) == 2
    assert not network.forward.calls
    handle.remove()
    recorded(network, rows(3))
    assert Again.captures == 2


def test_hooks_of_the_network_itself_run_around_the_graph():
    network, fired = toy(), []
    network.register_forward_hook(lambda *_: fired.append(1))
    for _ in range(3):
        run(network, rows(3))
    assert (len(fired), Again.replays) == (3, 2)


def test_accelerate_hooks(caplog):
    for module in ("", "block"):
        network, plain = toy(), Toy().eval()
        recorded(network, rows(3))
        inner = network.get_submodule(module)
        add_hook_to_module(inner, AlignDevicesHook(execution_device="cpu"))
        say_once.cache_clear()
        caplog.clear()
        assert "accelerate" in why_eager(caplog, network, rows(3))
        remove_hook_from_module(inner)
        replays = Again.replays
        for _ in range(3):
            assert torch.equal(run(network, rows(3)).sample, run(plain, rows(3)).sample)
        assert Again.replays == replays + 2


def test_ungraph_below_accelerates_hook():
    network = toy()
    add_hook_to_module(network, AlignDevicesHook(execution_device="cpu"))
    ungraph_forward(network)
    recorded(network, rows(3))
    remove_hook_from_module(network)
    recorded(network, rows(3))
    assert Again.captures == 0
    assert not isinstance(network.forward, GraphedForward)


def test_a_replaced_forward(caplog):
    network = toy()
    recorded(network, rows(3))
    network.block.forward = lambda x: x
    assert "forward of a Linear was replaced" in why_eager(caplog, network, rows(3))
    del network.block.forward
    recorded(network, rows(3))
    assert Again.captures == 2


def test_forwards_replaced_before_are_the_networks_own():
    network = Toy().eval()
    network.block.forward = lambda x: 2 * x
    graph_forward(network, recorder=Again)
    recorded(network, rows(3))
    assert Again.captures == 1


def _move(network: Any) -> None:
    network.block.weight.data = network.block.weight.data.clone()


def _replace(network: Any) -> None:
    network.block = nn.Linear(4, 4)


def _buffer(network: Any) -> None:
    network.shift = network.shift * 2


def _settings(network: Any) -> None:
    network._dirotq_runtime = ("plan", 2)


def _rename(network: Any) -> None:
    network.block.bias = None


@pytest.mark.parametrize("change", [_move, _replace, _buffer, _settings, _rename])
def test_what_drops_graphs(change):
    network = toy()
    recorded(network, rows(3))
    recorded(network, rows(2))
    change(network)
    plain = copy.deepcopy(network)
    ungraph_forward(plain)
    made = []
    for _ in range(3):
        assert torch.equal(run(network, rows(3)).sample, run(plain, rows(3)).sample)
        made.append((Again.captures, Again.replays))
    assert made == [(2, 2), (3, 3), (3, 4)]
    assert len(network.forward.calls) == 1


def test_another_dtype():
    network = toy()
    recorded(network, rows(3))
    network.double()
    assert run(network, rows(3).double()).sample.dtype == torch.float64
    assert len(network.forward.calls) == 1


def test_weights_changed_in_place_are_read():
    network = toy()
    recorded(network, rows(3))
    with torch.no_grad():
        network.block.weight.zero_()
    plain = copy.deepcopy(network)
    ungraph_forward(plain)
    assert torch.equal(run(network, rows(3)).sample, run(plain, rows(3)).sample)
    assert Again.captures == 1
