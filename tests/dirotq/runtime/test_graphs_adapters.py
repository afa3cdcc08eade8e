"""Adapters in a recorded network: peft's Python is repeated by a graph, until it is set otherwise.

peft is no dependency: a layer here has its attributes, and decides by them as peft's do.
"""

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from tiny_families import TINY
from tiny_line import build_transformer
from torch import Tensor, nn
from toy_graphs import (
    Again,
    Toy,
    fresh,  # noqa: F401
    recorded,
    rows,
    run,
)

from dirotq.runtime.graph_call import Call, NotGraphable
from dirotq.runtime.graphs import graph_forward, ungraph_forward


class Lora(nn.Module):
    """A linear with adapters of rank 1."""

    adapter_layer_names: ClassVar = ("lora_A", "lora_B")
    _active_adapter: Any = "one"
    _disable_adapters = False

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.scaling: dict[str, Any] = {}
        self.merged_adapters: list[str] = []

    def add(self, name: str, scaling: Any = 1.0) -> None:
        self.lora_A[name], self.lora_B[name] = nn.Linear(4, 1), nn.Linear(1, 4)
        self.scaling[name] = scaling

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self._disable_adapters or self.merged_adapters:
            return y
        active = self._active_adapter
        for name in [active] if isinstance(active, str) else active:
            if name in self.lora_A:
                y = y + self.scaling[name] * self.lora_B[name](self.lora_A[name](x))
        return y


def scaled(forward: Any) -> Any:
    """As diffusers does with ``scale`` among the attention's arguments: if they come by name."""

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(kwargs.get("joint_attention_kwargs") or {})
        scale, before = given.pop("scale", 1.0), self.block.scaling["one"]
        self.block.scaling["one"] = before * scale
        try:
            return forward(self, *args, **kwargs | {"joint_attention_kwargs": given})
        finally:
            self.block.scaling["one"] = before

    return wrapper


class Adapted(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.block: Any = Lora(self.block)  # type: ignore[assignment]
        self.block.add("one")
        self.block.add("two")
        self._hf_peft_config_loaded = True

    forward = scaled(Toy.forward)


def adapted() -> Any:
    network = Adapted().eval()
    graph_forward(network, recorder=Again)
    return network


def _set(**changes: Any) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        for name, value in changes.items():
            setattr(layer, name, value)

    return change


CHANGES: dict[str, Callable[[Any], Any]] = {
    "another one": _set(_active_adapter="two"),
    "both": _set(_active_adapter=["one", "two"]),
    "disabled": _set(_disable_adapters=True),
    "merged": lambda layer: layer.merged_adapters.append("one"),
    "scaled": lambda layer: layer.scaling.update(one=0.5),
    "a scale that is a tensor": lambda layer: layer.scaling.update(one=torch.tensor(0.25)),
    "one more": lambda layer: layer.add("three"),
    "deleted": lambda layer: layer.lora_A.pop("one"),
    "loaded anew": lambda layer: layer.add("one"),
    "weights that lie elsewhere": lambda layer: setattr(
        layer.lora_A["one"].weight, "data", layer.lora_A["one"].weight.data * 3
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_adapters_are_recorded_and_changes_drop_them(change):
    network = adapted()
    recorded(network, rows(3))
    run(network, rows(3, 1))
    assert (Again.captures, Again.replays) == (1, 2)
    change(network.block)
    after = [run(network, rows(3, seed)).sample for seed in range(3)]
    assert (Again.captures, Again.replays) == (2, 4)
    ungraph_forward(network)
    for seed, got in enumerate(after):
        assert torch.equal(got, run(network, rows(3, seed)).sample)


def test_lists_of_active_adapters_are_changed_in_place():
    network = adapted()
    network.block._active_adapter = ["one"]
    recorded(network, rows(3))
    network.block._active_adapter.append("two")
    recorded(network, rows(3))
    assert Again.captures == 2


def test_weights_of_an_adapter_written_in_place_are_read():
    network = adapted()
    recorded(network, rows(3))
    with torch.no_grad():
        network.block.lora_A["one"].weight.zero_()
    got = run(network, rows(3)).sample
    assert Again.captures == 1
    ungraph_forward(network)
    assert torch.equal(got, run(network, rows(3)).sample)


def test_an_adapter_for_a_recorded_network():
    network = Toy().eval()
    graph_forward(network, recorder=Again)
    recorded(network, rows(3))
    network.block = Lora(network.block)  # type: ignore[assignment]
    recorded(network, rows(3))
    network.block.add("one")
    recorded(network, rows(3))
    assert Again.captures == 3


@pytest.mark.parametrize("scale", [0.5, 0.0])
def test_the_scale_of_a_call(scale):
    network, plain, call = adapted(), Adapted().eval(), {"joint_attention_kwargs": {"scale": scale}}
    for seed in range(3):
        for given in (call, {}):
            got = run(network, rows(3, seed), **given).sample
            assert torch.equal(got, run(plain, rows(3, seed), **given).sample)
    assert (Again.captures, Again.replays) == (2, 4)
    other = run(network, rows(3), joint_attention_kwargs={"scale": 2.0}).sample
    assert not torch.equal(other, run(network, rows(3), **call).sample)


class Images(Toy):
    """Reads an IP-adapter's images, and takes them out of what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.block.processor = SimpleNamespace(scale=[[1.0]])

    def forward(self, hidden_states: Tensor, *, joint_attention_kwargs: dict[str, Any]) -> Any:
        (images,) = joint_attention_kwargs.pop("ip_adapter_image_embeds")
        return (self.block(hidden_states) + self.block.processor.scale[0][0] * images,)


def test_images_of_an_ip_adapter():
    network, plain = Images().eval(), Images().eval()
    graph_forward(network, recorder=Again)
    for scale in (1.0, 0.5):
        for one in (network, plain):
            one.block.processor.scale[0][0] = scale
        for seed in range(3):
            images = {"ip_adapter_image_embeds": [rows(3, seed)]}
            got, want = (
                run(one, rows(3), joint_attention_kwargs=dict(images)) for one in (network, plain)
            )
            assert torch.equal(got[0], want[0])
    assert (Again.captures, Again.replays) == (2, 4)


def test_a_scale_without_its_name():
    """diffusers' decorator does not see it: neither must a graph."""

    def forward(x: Tensor, attention_kwargs: Any = None) -> None: ...

    signature, given = inspect.signature(forward), {"scale": 0.5}
    with pytest.raises(NotGraphable, match="not given by name"):
        Call.of(signature, (rows(3), given), {})
    Call.of(signature, (rows(3), {}), {})
    call = Call.of(signature, (rows(3),), {"attention_kwargs": given})
    bound = call.bind(signature, call.tensors)
    assert (bound.args, bound.kwargs["attention_kwargs"]) == ((), given)


def test_peft():
    """peft itself, where it is installed, by diffusers' own methods."""
    peft = pytest.importorskip("peft")
    network, inputs = build_transformer(num_layers=1, num_single_layers=1), TINY["flux"].inputs()
    inputs |= {"guidance": None, "return_dict": False}

    def call(seed: int) -> dict[str, Any]:
        return inputs | {"timestep": torch.tensor([0.1 * seed, 0.9])}

    graph_forward(network, recorder=Again)
    recorded(network, **call(0))
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "proj_mlp"])
    network.add_adapter(config, "one")
    network.add_adapter(config, "two")
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: network.set_adapters(["one"], [0.5]),
        lambda: network.set_adapters(["one", "two"], [1.0, 2.0]),
        lambda: network.set_adapters(["one", "two"], [1.0, 1.5]),
        network.disable_adapters,
        network.enable_adapters,
        network.fuse_lora,
        network.unfuse_lora,
        lambda: network.delete_adapters("two"),
    ]
    for turn, change in enumerate(changes):
        change()
        for seed in range(3):
            got = run(network, **call(seed))[0]
            with torch.no_grad():
                assert torch.equal(got, network.forward.original(**call(seed))[0])
        assert Again.captures == turn + 2
    for seed in range(3):
        run(network, **call(seed), joint_attention_kwargs={"scale": 0.25})
    assert Again.captures == len(changes) + 2
