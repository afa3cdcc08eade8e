"""Compiled blocks compute what they computed, of every family, and step aside where they must."""

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from compiling import compiling, linears
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from tiny_families import TINY
from tiny_offload import NETWORKS, call, network
from tiny_packed import packed
from tiny_spec import tiny_spec
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from dirotq.errors import ConfigError
from dirotq.kernels import chip
from dirotq.models.call import Call
from dirotq.models.families import family_of
from dirotq.packed.swap import swap_sites
from dirotq.runtime.accelerate import accelerate
from dirotq.runtime.compiled import CompiledForward, compile_blocks, repeated_blocks

JOINED = {
    "flux": 7, "flux2": 4, "pixart": 2, "sana": 2, "sd3": 6, "qwen_image": 4, "z_image": 3,
    "wan": 2,
}  # fmt: skip
"""Reads that another one of the same tensor takes over, of one block of each class."""
NORMED = {"flux": 4, "flux2": 4, "sd3": 4, "qwen_image": 2, "z_image": 2, "wan": 2, "discovered": 2}
"""Calls of the step that norms and turns q or k."""
READ = {"flux": [10, 3]}
"""Packed linears of each graph. Modulators, q k v, output and MLP of two streams; modulator, q k v
with MLP, output: a site is read once."""
GELUS = {"flux": 3, "pixart": 1, "sd3": 2, "qwen_image": 2, "wan": 1}


def varied(name: str, **changes: Any) -> Any:
    """A packed network whose sites differ in rank, as ``rank=budget`` chooses them."""
    made = TINY[name].build(**changes)
    sites = family_of(type(made).__name__).sites(made)
    read = [site for site in sites if not (site.kind == "modulator" and site.text)]
    ranks = {site: 8 + i % 3 if site.kind == "block" else 0 for i, site in enumerate(read)}

    def build(site: Any) -> Any:
        rank = ranks.get(site, 0)
        spec = tiny_spec(dim=site.in_features, rows=site.out_features, rank=rank)
        return packed(spec, bias=site.bias)

    swap_sites(made, sites, build)
    return made


@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_blocks_compute_the_same(plain_network, name):
    plain, want = plain_network(name)
    with compiling() as seen:
        made = accelerate(copy.deepcopy(plain), compile=True)
        for _ in range(2):
            torch.testing.assert_close(call(made, name), want, rtol=1e-4, atol=1e-5)
    assert seen.graphs
    if name in READ:
        assert [len(linears(graph)) for graph in seen.graphs] == READ[name]
    assert seen["sites.rewrite"] >= JOINED.get(name, 1)
    assert seen["prologues.rewrite"] >= GELUS.get(name, 0)
    assert seen["norm_rope.rewrite"] >= NORMED.get(name, 0)
    assert bool(seen["attention"]) == (name not in ("sana", "qwen_image"))
    assert call(accelerate(made, compile=False), name).equal(want)


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_compiled_blocks_survive_the_compilers_own_changes(plain_network, name):
    plain, want = plain_network(name)
    with compiling(aot_eager):
        made = accelerate(copy.deepcopy(plain), compile=True)
        torch.testing.assert_close(call(made, name), want, rtol=1e-4, atol=1e-5)


def test_a_network_is_compiled_as_often_at_any_depth():
    """Twice a class: the second block makes a symbol of what differs, ranks here."""
    made = varied("flux", num_layers=4, num_single_layers=5, guidance_embeds=True)
    want = call(made, "flux")
    with compiling() as seen:
        compile_blocks(made)
        torch.testing.assert_close(call(made, "flux"), want, rtol=1e-4, atol=1e-5)
    assert len(seen.graphs) == 4


@pytest.mark.parametrize(("name", "graphs"), [("flux", 2), ("pixart", 1), ("sana", 1)])
def test_where_tokens_lie_is_no_reason_to_compile_again(name, graphs):
    """One image: the first block of PixArt and SANA reads channels apart, FLUX.1's single blocks
    get slices of longer sequences."""
    made = varied(name, **({"guidance_embeds": True} if name == "flux" else {}))
    call = Call((), TINY[name].inputs()).map(lambda t: t[:1] if t.ndim and len(t) == 2 else t)
    with torch.no_grad(), compiling() as seen:
        want = made(**call.kwargs, return_dict=False)[0]
        compile_blocks(made)
        got = made(**call.kwargs, return_dict=False)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert len(seen.graphs) <= graphs


class Nothing(ModelHook):
    """A hook of accelerate that leaves everything as it is."""


def test_what_is_hooked_inside_runs_module_by_module(plain_network):
    plain, want = plain_network("flux")
    with compiling() as seen:
        made = accelerate(copy.deepcopy(plain), compile=True)
        linear = made.transformer_blocks[0].attn.to_q
        add_hook_to_module(linear, Nothing())
        assert call(made, "flux").isfinite().all()
        assert len(seen.graphs) == 1  # single blocks
        remove_hook_from_module(linear)
        torch.testing.assert_close(call(made, "flux"), want, rtol=1e-4, atol=1e-5)
        assert len(seen.graphs) == 2


def test_hooks_around_a_block_run(plain_network):
    plain, _ = plain_network("pixart")
    with compiling() as seen:
        made, fired = accelerate(copy.deepcopy(plain), compile=True), []
        made.transformer_blocks[1].register_forward_hook(lambda *_: fired.append(1))
        call(made, "pixart")
    assert seen.graphs and fired == [1]


def test_another_module_inside_is_compiled_with_the_rest(plain_network):
    """As adapters put theirs around a linear."""
    plain, want = plain_network("pixart")

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    def doubled(made: Any) -> Any:
        for block in made.transformer_blocks:
            block.attn1.to_q = Doubled(block.attn1.to_q)
        return made

    plainly = call(doubled(copy.deepcopy(plain)), "pixart")
    with compiling() as seen:
        made = accelerate(copy.deepcopy(plain), compile=True)
        torch.testing.assert_close(call(made, "pixart"), want, rtol=1e-4, atol=1e-5)
        before = len(seen.graphs)
        torch.testing.assert_close(call(doubled(made), "pixart"), plainly, rtol=1e-4, atol=1e-5)
        assert len(seen.graphs) > before


def test_a_failed_compilation_is_said_once_and_the_result_is_right(plain_network, caplog):
    plain, want = plain_network("pixart")

    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler here")

    chip.say_once.cache_clear()
    with compiling(broken), caplog.at_level(logging.WARNING):
        made = accelerate(copy.deepcopy(plain), compile=True)
        for _ in range(2):
            assert call(made, "pixart").equal(want)
    said = [r.message for r in caplog.records if "without the compiler" in r.message]
    assert len(said) == 1
    assert "BasicTransformerBlock" in said[0] and "no compiler here" in said[0]


def test_an_error_of_the_block_itself_is_the_blocks_own(plain_network):
    with compiling():
        made = accelerate(copy.deepcopy(plain_network("pixart")[0]), compile=True)
        block = made.transformer_blocks[0]
        for wrong in ((torch.zeros(1, 4, 64),), (torch.zeros(1, 4, 64), *[None] * 3, "late")):
            with torch.no_grad(), pytest.raises(AttributeError) as plainly:
                type(block).forward(block, *wrong)
            with torch.no_grad(), pytest.raises(AttributeError) as ours:
                block(*wrong)
            assert str(ours.value) == str(plainly.value)
        assert not block.forward.compiler.failed


def test_gradients_are_not_compiled(plain_network):
    with compiling() as seen:
        block = accelerate(copy.deepcopy(plain_network("pixart")[0]), compile=True)
        block = block.transformer_blocks[0]
        timestep, text = torch.randn(1, 6 * 64), torch.randn(1, 5, 64)
        arguments = torch.randn(1, 4, 64), None, text, None, timestep
        with torch.no_grad():
            block(*arguments)
        assert len(seen.graphs) == 1
        block(*arguments)
        assert len(seen.graphs) == 1


def test_a_users_compiler_sees_the_class_itself(plain_network):
    plain, want = plain_network("pixart")
    seen = []
    with compiling() as ours:
        made = accelerate(copy.deepcopy(plain), compile=True)
        outer = torch.compile(made, backend=lambda graph, _: seen.append(graph) or graph)
        torch.testing.assert_close(call(outer, "pixart"), want, rtol=1e-4, atol=1e-5)
    assert seen and not ours.graphs


def by_pickle(made: Any) -> Any:
    return pickle.loads(pickle.dumps(made))  # noqa: S301


@pytest.mark.parametrize("way", [copy.deepcopy, by_pickle])
def test_a_copy_compiles_its_own_weights(plain_network, way):
    plain, want = plain_network("flux")
    with compiling() as seen:
        made = accelerate(copy.deepcopy(plain), compile=True)
        call(made, "flux")
        twin = way(made)
        for block in repeated_blocks(twin):
            assert block.forward.block is block
        with torch.no_grad():
            for parameter in twin.transformer_blocks.parameters():
                parameter.zero_()
        assert not torch.allclose(call(twin, "flux"), want)
        torch.testing.assert_close(call(made, "flux"), want, rtol=1e-4, atol=1e-5)
    assert len(seen.graphs) == 4


def test_blocks_are_what_repeats():
    made = network("pixart")
    made.extra = nn.Sequential(nn.SiLU(), packed(tiny_spec()))  # a numbered linear is no block
    assert repeated_blocks(made) == list(made.transformer_blocks)


def test_a_replaced_forward_stays():
    made = network("pixart")
    block = made.transformer_blocks[0]
    block.forward = mine = lambda *args, **kwargs: type(block).forward(block, *args, **kwargs)
    accelerate(made, compile=True)
    assert block.forward is mine
    assert isinstance(made.transformer_blocks[1].forward, CompiledForward)
    accelerate(made, compile=False)
    assert block.forward is mine
    assert "forward" not in vars(made.transformer_blocks[1])


def test_a_cpu_compiles_nothing(plain_network, monkeypatch):
    plain, want = plain_network("flux")
    monkeypatch.setattr(torch, "compile", None)
    assert call(accelerate(copy.deepcopy(plain), compile=True), "flux").equal(want)


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="compile is 'yes'; use True or False"):
        accelerate(nn.Linear(1, 1), compile="yes")
    with pytest.raises(ConfigError, match="no fused; it has compile, graphs, attention"):
        accelerate(nn.Linear(1, 1), fused=True)


@pytest.mark.parametrize("cache", ["first block", "attention"])
def test_diffusers_caches_work_in_compiled_networks(plain_network, cache):
    """One hooks blocks, which run compiled inside of it; the other one attentions."""
    plain, _ = plain_network("flux")

    def cached(made: Any) -> Any:
        if cache == "first block":
            made.enable_cache(FirstBlockCacheConfig(threshold=0.05))
        else:
            made.enable_cache(
                PyramidAttentionBroadcastConfig(
                    spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
                )
            )
        return made

    def calls(made: Any) -> list[torch.Tensor]:
        with made.cache_context("cond"):
            return [call(made, "flux") for _ in range(3)]

    want = calls(cached(copy.deepcopy(plain)))
    with compiling() as seen:
        got = calls(cached(accelerate(copy.deepcopy(plain), compile=True)))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert bool(seen.graphs) == (cache == "first block")
