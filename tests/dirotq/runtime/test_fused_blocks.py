"""Fused blocks of every family against diffusers' own, on tiny random transformers."""

import copy
from collections import Counter
from importlib import import_module
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from tiny_fused import (
    IMAGES,
    VARIANTS,
    Wide,
    blocks,
    call,
    fallen,
    family,
    inputs,
    off,
    original,
    quantize,
    stack,
)
from torch import Tensor

from dirotq import accelerate
from dirotq.kernels.linear import QuantLinear
from dirotq.models.families import FAMILIES
from dirotq.packed import swap
from dirotq.packed.swap import swap_sites
from dirotq.runtime import fused_block, look_ahead

every_variant = pytest.mark.parametrize("name", VARIANTS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@every_variant
def test_outputs_are_the_originals_and_every_site_is_read_once(name, dtype):
    want = call(original(name).to(dtype), name, dtype)
    network = stack(original(name).to(dtype))
    unfused = fallen(network)
    got = call(network, name, dtype)
    assert not unfused
    assert got.dtype == dtype
    assert off(got, want) < 2e-6  # some of the arithmetic is float32 in diffusers
    for path, wide in network.named_modules():
        if isinstance(wide, Wide):
            assert wide.calls == [(0, len(wide.weight))], path


@every_variant
def test_bfloat16_is_no_less_exact_than_diffusers(name):
    exact = call(original(name).double(), name)
    dtype = torch.bfloat16
    theirs = off(call(original(name).to(dtype), name, dtype).double(), exact)
    network = stack(original(name).to(dtype))
    unfused = fallen(network)
    ours = off(call(network, name, dtype).double(), exact)
    assert not unfused
    assert ours < 1.2 * theirs


@every_variant
def test_packed_blocks_agree_with_unfused_ones(name):
    network = quantize(original(name))
    unfused = fallen(network)
    fused = call(network, name, torch.float32)
    assert not unfused
    accelerate(network, fused=False)
    apart = call(network, name, torch.float32)
    assert unfused == list(range(len(blocks(network))))
    assert 0 < apart.std() < torch.inf
    assert off(fused, apart) < 0.02  # a code may round the other way
    accelerate(network, fused=True)
    assert torch.equal(call(network, name, torch.float32), fused)


class Halving:
    """A processor of somebody else."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        given = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "image_rotary_emb": image_rotary_emb,
        }
        return halved(
            self.inner(attn, hidden_states, **{k: v for k, v in given.items() if v is not None})
        )


def halved(output: Any) -> Any:
    return tuple(o / 2 for o in output) if isinstance(output, tuple) else output / 2


def attention_of(block: Any) -> Any:
    return block.attn if hasattr(block, "attn") else block.attn1


def another_processor(block: Any) -> None:
    attn = attention_of(block)
    attn.set_processor(Halving(attn.processor))


def hooked_attention(block: Any) -> None:
    attention_of(block).register_forward_hook(lambda *args: halved(args[-1]))


def replaced_attention(block: Any) -> None:
    attn = attention_of(block)
    inner = attn.forward
    attn.forward = lambda *args, **kwargs: halved(inner(*args, **kwargs))


def hooked_feed_forward(block: Any) -> None:
    block.ff.register_forward_hook(lambda *args: args[-1] / 2)


def hooked_norm(block: Any) -> None:
    block.norm2.register_forward_hook(lambda *args: args[-1] / 2)


CHANGES = [
    another_processor,
    hooked_attention,
    replaced_attention,
    hooked_feed_forward,
    hooked_norm,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["flux", "pixart", "sana", "sd3.5"])
def test_a_changed_block_runs_unfused(name, change):
    plain, network = original(name).double(), stack(original(name).double())
    before = call(plain, name)
    unfused = fallen(network)
    for transformer in (plain, network):
        change(transformer.transformer_blocks[0])
    want = call(plain, name)
    assert off(before, want) > 1e-3
    assert off(call(network, name), want) < 2e-6
    assert unfused == [0]


@pytest.mark.parametrize("name", ["pixart", "sd3.5"])
def test_chunked_feed_forwards_run_unfused(name):
    network = stack(original(name).double())
    unfused = fallen(network)
    for block in blocks(network):
        block.set_chunk_feed_forward(1, 0)
    assert off(call(network, name), call(original(name).double(), name)) < 2e-6
    assert len(unfused) == len(blocks(network))


@pytest.mark.parametrize("name", ["pixart", "sana"])
def test_dropout_is_not_left_out(name):
    network = stack(original(name, dropout=0.5).double())
    unfused = fallen(network)
    network.train()
    call(network, name)
    assert len(unfused) == len(blocks(network))
    network.eval()
    call(network, name)
    assert len(unfused) == len(blocks(network))


@every_variant
def test_gradients_and_autocast_run_unfused(name):
    network = stack(original(name))
    unfused = fallen(network)
    given = inputs(name, torch.float32)
    assert network(**given, return_dict=False)[0].requires_grad
    assert len(unfused) == len(blocks(network))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network(**given, return_dict=False)
    assert len(unfused) == 2 * len(blocks(network))


@pytest.mark.parametrize(
    ("name", "argument", "given"),
    [
        ("pixart", "cross_attention_kwargs", {"scale": 1.0}),
        ("pixart", "attention_mask", torch.ones(IMAGES, 15).tril()),
        ("sd3.5", "joint_attention_kwargs", {"attention_mask": None}),
    ],
)
def test_arguments_for_the_attention_run_unfused(name, argument, given):
    want = call(original(name).double(), name, **{argument: copy.copy(given)})
    network = stack(original(name).double())
    unfused = fallen(network)
    assert off(call(network, name, **{argument: copy.copy(given)}), want) < 2e-6
    assert len(unfused) == len(blocks(network))


def test_masks_of_pixart_are_honored():
    """A mask per image, a bias per query, none at all, and one that is too short."""
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(IMAGES, 15, 5, generator=generator).double()
    plain, network = original("pixart").double(), stack(original("pixart").double())
    unfused = fallen(network)
    outputs = []
    for mask in (torch.tensor([[1, 1, 0, 0, 1]] * IMAGES), bias, None):
        given = inputs("pixart", torch.float64) | {"encoder_attention_mask": mask}
        with torch.no_grad():
            want, got = (t(**given, return_dict=False)[0] for t in (plain, network))
        assert off(got, want) < 1e-9
        outputs.append(got)
    assert not unfused
    assert off(outputs[0], outputs[2]) > 1e-4
    assert off(outputs[1], outputs[2]) > 1e-4
    with pytest.raises(RuntimeError), torch.no_grad():
        given["encoder_attention_mask"] = torch.ones(IMAGES, 4)
        network(**given)
    assert unfused == [0]


@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_setting_the_plain_processor_again_fuses_again(name):
    network = stack(original(name).double())
    unfused = fallen(network)
    network.set_attn_processor({"pixart": AttnProcessor2_0, "sd3": JointAttnProcessor2_0}[name]())
    call(network, name)
    assert not unfused


@every_variant
def test_a_deep_copy_reads_its_own_sites(name):
    network = stack(original(name).double())
    want = call(network, name)
    twin = copy.deepcopy(network)
    unfused = fallen(twin)
    assert torch.equal(call(twin, name), want)
    assert not unfused
    for block in blocks(twin):
        assert block.forward.args[0] is block
        assert block._dirotq_shared is twin._dirotq_shared
        assert block._dirotq_shared is not network._dirotq_shared
    accelerate(twin, fused=False)
    assert network._dirotq_shared.runtime.fused
    for wide in twin.modules():
        if isinstance(wide, Wide):
            wide.weight.data.mul_(1.5)
    assert off(call(twin, name), want) > 1e-3
    assert torch.equal(call(network, name), want)


@every_variant
def test_names_of_the_state_dict_are_those_without_sharing(name, monkeypatch):
    names = list(stack(original(name)).state_dict())
    monkeypatch.setattr(swap, "known_family", lambda _: None)
    assert list(stack(original(name)).state_dict()) == names


@every_variant
def test_swapping_block_by_block_fuses_as_at_once(name):
    whole, network = stack(original(name).double()), original(name).double()
    accelerate(network, attention="exact")
    sites = family(network).sites(network)
    linear = network.get_submodule
    for place in dict.fromkeys(site.block for site in sites):
        inside = [site for site in sites if site.block == place]
        swap_sites(network, inside, lambda s: Wide([linear(c) for c in s.linears]))
    unfused = fallen(network)
    assert torch.equal(call(network, name), call(whole, name))
    assert not unfused
    accelerate(network, fused=False)
    assert off(call(network, name), call(whole, name)) < 2e-6
    assert unfused == list(range(len(blocks(network))))


def test_what_is_not_swapped_is_not_fused():
    network = original("pixart").double()
    sites = [s for s in family(network).sites(network) if s.name.endswith("0.proj")]
    swap_sites(network, sites, lambda s: Wide([network.get_submodule(c) for c in s.linears]))
    assert not any("forward" in vars(block) for block in blocks(network))
    assert off(call(network, "pixart"), call(original("pixart").double(), "pixart")) < 1e-9


@pytest.mark.parametrize("table", FAMILIES, ids=lambda table: table.name)
def test_a_family_fuses_what_its_table_says(table, monkeypatch):
    if not table.fusions:
        table.share(torch.nn.Module())  # nothing to install
        return
    module = import_module(f"dirotq.runtime.{table.name}_fused")
    used = Counter()

    def spy(owner: Any, name: str, key: str) -> None:
        inner = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            used[key] += 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    names = {"modulated_norm": "norm", "concat_gelu": "concat", "qk_norm_rope": "qk_norm_rope"}
    for name, key in names.items():
        if hasattr(module, name):
            spy(module, name, key)
    spy(fused_block, "gelu", "gelu")
    spy(look_ahead, "modulated_norm", "norm")
    variant = next(variant for variant, (key, _) in VARIANTS.items() if key == table.name)
    network = quantize(original(variant))
    shared = network._dirotq_shared
    if shared.modulators is not None:
        assert shared.modulators._together is not None
        spy(shared.modulators, "_together", "modulators")
    forward = QuantLinear.forward

    def read(self: Any, x: Any, rows: slice | None = None) -> Tensor:
        used["shared_sites" if len(self.spec.out_features) > 1 and rows is None else "other"] += 1
        assert rows is None
        return forward(self, x, rows)

    monkeypatch.setattr(QuantLinear, "forward", read)
    call(network, variant, torch.float32)
    assert set(used) - {"other"} == set(table.fusions)
    if shared.modulators is not None:
        assert used["modulators"] == 1


@pytest.mark.parametrize("name", ["pixart", "sana", "sd3.5"])
def test_the_whole_graph_is_captured(name):
    torch.compiler.reset()
    network = quantize(original(name))
    want = call(network, name, torch.float32)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert off(call(compiled, name, torch.float32), want) < 0.02
