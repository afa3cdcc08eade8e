"""Recorded graphs follow whatever is put into peft's layers past their methods."""

import copy
from typing import Any

import numpy
import pytest
import tiny_offload
import torch
from adapted_networks import Fixed, adapted, layers
from torch import nn
from toy_graphs import fresh, recorded, run  # noqa: F401

from dirotq.kernels.linear import QuantLinear
from dirotq.runtime.graphs import graph_forward

hotswap = pytest.importorskip("peft.utils.hotswap")


def test_graphs_follow_what_is_written_unsaid():
    """As peft's own contexts and users write ``scaling``, past every method."""
    made = adapted("flux", "one", "two")
    made.set_adapters(["one"], [1.0])
    graph_forward(made, recorder=Fixed)
    call = tiny_offload.inputs("flux") | {"return_dict": False}
    results = []
    for scale in (1.0, 0.5, 1.5, 0.0, 1.0):
        for layer in layers(made):
            layer.scaling["one"] = scale
        results += [run(made, **call)[0].clone() for _ in range(2)]
        with torch.no_grad():
            assert torch.equal(results[-1], made.forward.original(**call)[0])
    assert torch.equal(results[0], results[-1]) and not torch.equal(results[0], results[2])
    assert Fixed.captures == 1 and Fixed.replays > 5  # written in place
    for layer in layers(made):
        layer._active_adapter = ["two"]
    for _ in range(3):
        got = run(made, **call)[0].clone()
        with torch.no_grad():
            assert torch.equal(got, made.forward.original(**call)[0])
    assert not torch.equal(got, results[-1])


def _replaced(layer: Any) -> None:
    layer.lora_A["one"].weight = nn.Parameter(0.5 * layer.lora_A["one"].weight.detach())


def _other_module(layer: Any) -> None:
    layer.lora_A["one"] = copy.deepcopy(layer.lora_A["two"])


def _other_data(layer: Any) -> None:
    layer.lora_B["one"].weight.data = 0.5 * layer.lora_B["one"].weight.data


def _filled(layer: Any) -> None:
    layer.scaling["one"].fill_(0.25)


UNSAID = {
    "a new Parameter": _replaced,
    "another module": _other_module,
    "other data of a Parameter": _other_data,
    "other scales": lambda layer: setattr(layer, "scaling", {"one": 0.5, "two": 1.0}),
    "a scale of NumPy's": lambda layer: layer.scaling.update(one=numpy.float32(0.75)),
    "a tensor for a scale": lambda layer: layer.scaling.update(one=torch.tensor(1.5)),
    "a scale in its place": _filled,
    "active ones in a set": lambda layer: setattr(layer, "_active_adapter", {"one", "two"}),
    "a set in its place": lambda layer: layer._active_adapter.remove("one"),
    "merged by hand": lambda layer: layer.merged_adapters.append("one"),
}


def test_graphs_follow_whatever_else_is_put_there():
    """Also values that earlier ones made way for; each is held against directions made anew."""
    made = adapted("flux", "one", "two")
    made.set_adapters(["one"], [1.0])
    graph_forward(made, recorder=Fixed)
    call = tiny_offload.inputs("flux") | {"return_dict": False}
    before = [run(made, **call)[0].clone() for _ in range(3)][-1]

    def swap() -> None:
        found = {n: 0.5 * p for n, p in made.state_dict().items() if ".lora_" in n and ".two." in n}
        hotswap.hotswap_adapter_from_state_dict(made, found, "two", made.peft_config["two"])

    changes = {k: lambda f=f: [f(layer) for layer in layers(made)] for k, f in UNSAID.items()}
    changes |= {
        "none merged": lambda: [layer.merged_adapters.clear() for layer in layers(made)],
        "a hot swap of peft's": swap,
        "a state dict's tensors": lambda: made.load_state_dict(
            {n: 0.5 * p for n, p in made.state_dict().items() if ".lora_" in n},
            assign=True,
            strict=False,
        ),
    }
    for name, change in changes.items():
        change()
        replays = Fixed.replays
        got = [run(made, **call)[0].clone() for _ in range(4)]
        assert Fixed.replays > replays, name
        for updates in [m.updates for m in made.modules() if isinstance(m, QuantLinear)]:
            updates.forget_made()
        with torch.no_grad():
            want = made.forward.original(**call)[0]
        assert all(torch.equal(one, want) for one in got), name
        assert not torch.equal(want, before), name
        before = want.clone()
