"""LoRAs on packed networks of every family: exact, compiled once, followed by graphs and copies."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import tiny_offload
import torch
from adapted_networks import adapted, config, layers, linears, set_adapters
from compiling import compiling
from tiny_offload import KINDS, NETWORKS
from torch import Tensor, nn
from toy_graphs import Again, fresh, recorded, run  # noqa: F401

from dirotq.errors import UnsupportedError
from dirotq.kernels.linear import PointwiseView, rows_of
from dirotq.models.call import Call
from dirotq.packed.guards import guard
from dirotq.runtime.accelerate import accelerate
from dirotq.runtime.graphs import graph_forward

peft = pytest.importorskip("peft")


class Added(nn.Module):
    """A module plus the delta of its weight: what a LoRA means."""

    def __init__(self, base: nn.Module, delta: Tensor) -> None:
        super().__init__()
        self.base, self.delta = base, delta

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if isinstance(self.base, PointwiseView):
            return y + nn.functional.conv2d(x, self.delta[..., None, None].to(x.dtype))
        return y + nn.functional.linear(x, self.delta.to(x.dtype))


def with_deltas(made: nn.Module) -> nn.Module:
    """The same network with every adapter's product added to the linear's outputs."""
    twin = copy.deepcopy(made)
    for name, layer in list(twin.named_modules()):
        if not isinstance(layer, peft.tuners.lora.LoraLayer):
            continue
        delta: Any = 0
        for adapter in layer.active_adapters:
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            delta = delta + layer.scaling[adapter] * up.flatten(1) @ down.flatten(1)
        parent, _, leaf = name.rpartition(".")
        twin.get_submodule(parent).add_module(leaf, Added(layer.base_layer, delta.detach()))
        rows_of(layer.base_layer)[0].updates = None
    return twin


def double(made: nn.Module, name: str) -> Tensor:
    given = Call((), tiny_offload.inputs(name))
    given = given.map(lambda t: t.double() if t.is_floating_point() else t)
    with torch.no_grad():
        result = made(**given.kwargs, return_dict=False)[0]
    return torch.stack(list(result)) if isinstance(result, list) else result


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_in_every_family(name):
    """Two adapters, scaled, on all packed linears; against the deltas of the weights, float64."""
    made = adapted(name, "one", "two").double()
    set_adapters(made, ["one", "two"], [0.7, -0.5])
    assert len(layers(made)) == len(linears(tiny_offload.network(name)))
    want = double(with_deltas(made), name)
    got = double(made, name)
    assert (got - want).norm() <= 1e-10 * want.norm()
    for layer in layers(made):
        layer.enable_adapters(False)
    assert (double(made, name) - want).norm() > 1e-3 * want.norm()


def test_compiled_blocks_follow_and_are_compiled_once():
    made, plain = adapted("flux", "one", "two"), adapted("flux", "one", "two")
    with compiling() as seen:
        accelerate(made, compile=True)

        def follow(change: Callable[[nn.Module], None]) -> int:
            for network in (made, plain):
                change(network)
            got, want = tiny_offload.call(made, "flux"), tiny_offload.call(plain, "flux")
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            return len(seen.graphs)

        graphs = follow(lambda network: network.set_adapter("one"))
        assert seen["sites.rewrite"] >= 7
        for change in (
            lambda network: network.set_adapters(["one"], [0.3]),
            lambda network: network.set_adapters(["two"], [2.0]),
            lambda network: network.set_adapters(["one"], [0.0]),
            _write,
        ):
            assert follow(change) == graphs  # of the same ranks
        wider = follow(lambda network: network.set_adapters(["one", "two"], [1.0, 1.0]))
        assert wider <= 2 * graphs  # ranks become symbols


def _write(made: nn.Module) -> None:
    """As training or a hot swap does: in place."""
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_" in name:
                parameter.mul_(1.5)


def test_graphs_follow():
    made = adapted("flux", "one", "two")
    graph_forward(made, recorder=Again)
    call = tiny_offload.inputs("flux") | {"return_dict": False}
    changes = [
        lambda: made.set_adapters(["one"], [1.0]),
        lambda: made.set_adapters(["one"], [0.5]),
        lambda: made.set_adapters(["one", "two"], [1.0, 2.0]),
        lambda: _write(made),
        made.disable_adapters,
        made.enable_adapters,
        made.fuse_lora,
        made.unfuse_lora,
        lambda: made.delete_adapters("two"),
    ]
    for turn, change in enumerate(changes):
        change()
        for _ in range(3):
            got = run(made, **call)[0]
            with torch.no_grad():
                assert torch.equal(got, made.forward.original(**call)[0])
        assert Again.captures == max(turn, 1)  # another weight is written where graphs read it
    want = [run(made, **call)[0]]
    for scale in (0.25, 1.0, 0.25):
        given = call | {"joint_attention_kwargs": {"scale": scale}}
        for _ in range(3):
            want.append(run(made, **given)[0])
            with torch.no_grad():
                assert torch.equal(want[-1], made.forward.original(**given)[0])
    assert torch.equal(want[0], run(made, **call)[0])
    assert not torch.equal(want[0], want[1])


@pytest.mark.parametrize("way", KINDS)
def test_offloading_brings_them_in(way, tmp_path):
    made = adapted("sd3")
    want = tiny_offload.call(made, "sd3")
    made.set_adapters(["one"], [0.5])
    half = tiny_offload.call(made, "sd3")
    made.set_adapters(["one"], [1.0])
    KINDS[way](made, tmp_path)
    torch.testing.assert_close(tiny_offload.call(made, "sd3"), want, rtol=1e-5, atol=1e-6)
    made.set_adapters(["one"], [0.5])
    torch.testing.assert_close(tiny_offload.call(made, "sd3"), half, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])  # noqa: S301
def test_copies_have_adapters_of_their_own(way):
    made = adapted("sd3")
    want = tiny_offload.call(made, "sd3")
    twin = way(made)
    assert torch.equal(tiny_offload.call(twin, "sd3"), want)
    _write(twin)
    assert not torch.equal(tiny_offload.call(twin, "sd3"), want)
    assert torch.equal(tiny_offload.call(made, "sd3"), want)
    del made
    twin.disable_adapters()
    plain = tiny_offload.network("sd3")
    assert torch.equal(tiny_offload.call(twin, "sd3"), tiny_offload.call(plain, "sd3"))


def test_what_is_fused_stays_when_adapters_go():
    made, plain = adapted("sana"), tiny_offload.network("sana")
    want, before = tiny_offload.call(made, "sana"), tiny_offload.call(plain, "sana")
    made.fuse_lora(adapter_names=["one"])
    with pytest.warns(UserWarning, match="already merged"):
        made.fuse_lora(adapter_names=["one"])
    assert torch.equal(tiny_offload.call(made, "sana"), want)
    made.unfuse_lora()
    assert torch.equal(tiny_offload.call(made, "sana"), want)
    made.fuse_lora(safe_fusing=True)
    made.unload_lora()
    assert torch.equal(tiny_offload.call(made, "sana"), want)
    assert not torch.equal(want, before)


def test_a_damaged_adapter_is_not_fused_safely():
    made = adapted("sd3")
    layer = made.transformer_blocks[0].attn.to_q
    with torch.no_grad():
        layer.lora_A["one"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        made.fuse_lora(safe_fusing=True)


def test_layers_that_somebody_holds_are_off_once_unloaded():
    made, plain = adapted("sd3"), tiny_offload.network("sd3")
    held = layers(made)
    made.unload_lora()
    assert held
    assert torch.equal(tiny_offload.call(made, "sd3"), tiny_offload.call(plain, "sd3"))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (lambda: peft.LoraConfig(target_modules=["to_q"], use_dora=True), "use_dora"),
        (lambda: peft.LoraConfig(target_modules=["to_q"], lora_bias=True), "lora_bias"),
        (lambda: peft.LoraConfig(target_modules=["to_q"], init_lora_weights="pissa"), "pissa"),
        (lambda: peft.LoKrConfig(target_modules=["to_q"]), "LOKR"),
        (lambda: peft.LoHaConfig(target_modules=["to_q"]), "LOHA"),
        (lambda: peft.OFTConfig(target_modules=["to_q"], oft_block_size=4), "OFT"),
        (lambda: peft.VeraConfig(target_modules=["to_q"]), "VERA"),
    ],
)
def test_other_kinds_are_refused_by_name(kind, name):
    made = tiny_offload.network("sd3")
    guard(made)
    want = tiny_offload.call(made, "sd3")
    with pytest.raises(UnsupportedError, match=name):
        made.add_adapter(kind(), "one")
    assert torch.equal(tiny_offload.call(made, "sd3"), want)


def test_one_batch_has_one_set_of_adapters():
    made = adapted("sd3")
    layer = made.transformer_blocks[0].attn.to_q
    with pytest.raises(UnsupportedError, match="set_adapters"):
        layer(torch.randn(2, 5, layer.in_features), adapter_names=["one", "__base__"])


def test_layers_kept_in_16_bits_have_pefts_own(monkeypatch):
    made = tiny_offload.network("flux")
    guard(made)
    made.add_adapter(config(made, "x_embedder", "to_q"), "one")
    assert type(made.x_embedder) is peft.tuners.lora.Linear
    want = tiny_offload.call(made, "flux")
    made.set_adapters(["one"], [0.0])
    assert not torch.equal(tiny_offload.call(made, "flux"), want)


def test_training_says_that_it_is_not_for_packed_linears():
    made = adapted("sd3")
    x = torch.randn(2, 5, made.transformer_blocks[0].attn.to_q.in_features, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient"):
        made.transformer_blocks[0].attn.to_q(x).sum().backward()


def test_what_users_compile_themselves():
    """Nothing of ours runs around it: what changes adapters makes their directions at once."""
    made = adapted("sd3", "one", "two")
    layer = made.transformer_blocks[0].attn.to_q
    x = torch.randn(2, 5, layer.in_features)
    torch._dynamo.reset()
    whole: Any = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        for names, weights in ((["one"], [1.0]), (["one"], [0.5]), (["one", "two"], [1.0, 2.0])):
            made.set_adapters(names, weights)
            got = whole(x)
            torch.testing.assert_close(got, layer(x), rtol=1e-5, atol=1e-6)
        loose: Any = torch.compile(layer, backend="eager")
        layer.scale_layer(0.5)  # by hand: the compiler steps aside to look
        got = loose(x)
        torch.testing.assert_close(got, layer(x), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
