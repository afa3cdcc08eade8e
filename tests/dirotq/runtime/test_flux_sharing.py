import copy
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from safetensors.torch import load_file
from tiny_fused import Wide
from tiny_line import POOLED, TEXT, WIDTH, build_transformer
from tiny_packed import packed
from tiny_spec import tiny_spec
from torch import Tensor

from dirotq.kernels.linear import SiteView
from dirotq.models.flux import FLUX
from dirotq.packed.swap import swap_sites

QKV = [f"transformer_blocks.{i}.attn.{s}" for i in (0, 1) for s in ("qkv", "add_qkv")]
QKV_MLP = [f"single_transformer_blocks.{i}.qkv_mlp" for i in (0, 1)]


def original() -> Any:
    return build_transformer(num_layers=2, num_single_layers=2).double()


def stack(network: Any, *, leave: str = "nothing") -> Any:
    """Swap every site, but for those whose name ends with ``leave``, for a Wide of its linears."""
    sites = [site for site in FLUX.sites(network) if not site.name.endswith(leave)]
    linear = network.get_submodule
    swap_sites(network, sites, lambda site: Wide([linear(c) for c in site.linears]))
    return network


def quantize(network: Any) -> Any:
    """Swap every site for a packed linear with random content."""
    build = lambda site: packed(tiny_spec(dim=site.in_features, rows=site.out_features))  # noqa: E731
    swap_sites(network, FLUX.sites(network), build)
    return network


def call(network: Any, dtype: torch.dtype = torch.float64, **more: Any) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return network(
            hidden_states=torch.randn(2, 9, 16, generator=draw).to(dtype),
            encoder_hidden_states=torch.randn(2, 5, TEXT, generator=draw).to(dtype),
            pooled_projections=torch.randn(2, POOLED, generator=draw).to(dtype),
            timestep=torch.tensor([0.3, 0.8], dtype=dtype),
            img_ids=torch.randint(0, 3, (9, 3), generator=draw),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
            **more,
        )[0]


def calls(network: Any) -> dict[str, list[tuple[int, int]]]:
    return {n: m.calls for n, m in network.named_modules() if isinstance(m, Wide)}


def close(got: Tensor, want: Tensor) -> None:
    # Rotary embeddings are computed in float32, in another order where blocks are fused.
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


class Foreign:
    """A processor of somebody else, which reads q, k, v by diffusers' unfused names."""

    def __call__(self, attn: Any, hidden_states: Tensor, *rest: Any, **kwargs: Any) -> Any:
        assert hidden_states.shape[-1] == attn.query_dim
        unfused = copy.copy(attn)
        unfused.fused_projections = False
        return FluxAttnProcessor()(unfused, hidden_states, *rest, **kwargs)


def test_every_site_is_called_once():
    network = stack(original())
    call(network)
    found = calls(network)
    assert set(QKV + QKV_MLP) < set(found)
    for name, made in found.items():
        assert made == [(0, len(network.get_submodule(name).weight))], name


def test_a_site_is_called_as_a_module():
    network, fired = stack(original()), Counter()
    for name in calls(network):
        hook = lambda *_, name=name: fired.update([name])  # noqa: E731
        network.get_submodule(name).register_forward_pre_hook(hook)
    call(network)
    assert fired == Counter(calls(network).keys())


def test_outputs_are_those_of_the_original_and_of_the_unshared_network():
    want = call(original())
    network = stack(original())
    close(call(network), want)
    network.unfuse_qkv_projections()
    made = calls(network)
    made["transformer_blocks.0.attn.qkv"].clear()
    made["single_transformer_blocks.0.qkv_mlp"].clear()
    close(call(network), want)
    qkv = [(0, WIDTH), (WIDTH, 2 * WIDTH), (2 * WIDTH, 3 * WIDTH)]
    assert made["transformer_blocks.0.attn.qkv"] == qkv
    assert sorted(made["single_transformer_blocks.0.qkv_mlp"]) == [*qkv, (3 * WIDTH, 7 * WIDTH)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_single_block_is_diffusers_block(dtype):
    block = original().single_transformer_blocks[0]
    twin = stack(original()).single_transformer_blocks[0]
    block, twin = block.to(dtype), twin.to(dtype)
    draw = torch.Generator().manual_seed(0)
    image, text, temb = (
        torch.randn(2, *shape, generator=draw).to(dtype)
        for shape in ((9, WIDTH), (5, WIDTH), (WIDTH,))
    )
    rope = (torch.rand(14, 32, generator=draw), torch.rand(14, 32, generator=draw))
    with torch.no_grad():
        want = block(image, text, temb, rope)
        got = twin(image, text, temb, image_rotary_emb=rope, joint_attention_kwargs={})
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == dtype
        error = (ours - theirs).double().norm() / theirs.double().norm()
        assert error < torch.finfo(dtype).eps


def test_float16_is_clipped_as_in_diffusers():
    block = stack(original()).single_transformer_blocks[0].half()
    block.proj_out.bias.data.fill_(torch.inf)
    x = torch.zeros(1, 3, WIDTH, dtype=torch.float16)
    with torch.no_grad():
        text, image = block(x, x, torch.ones(1, WIDTH, dtype=torch.float16))
    assert max(text.abs().max(), image.abs().max()) == 65504


def test_names_of_the_state_dict_are_unchanged():
    network = stack(original())
    names = set(network.state_dict())
    assert {n for n in names if ".qkv." in n} == {
        f"transformer_blocks.{i}.attn.qkv.{p}" for i in (0, 1) for p in ("weight", "bias")
    }
    assert not [n for n in names if "to_qkv" in n or "to_added_qkv" in n or "site" in n]
    network.unfuse_qkv_projections()
    assert set(network.state_dict()) == names


def test_a_deep_copy_reads_its_own_sites():
    network = stack(original())
    want = call(network)
    twin = copy.deepcopy(network)
    for made in [*calls(network).values(), *calls(twin).values()]:
        made.clear()
    close(call(twin), want)
    assert not any(calls(network).values())
    assert all(len(made) == 1 for made in calls(twin).values())
    for block in twin.single_transformer_blocks:
        assert block.forward.args[0] is block
        block.qkv_mlp.weight.data.mul_(2)
    assert not torch.allclose(call(twin), want)
    close(call(network), want)


@pytest.mark.parametrize("side", ["transformer_blocks", "single_transformer_blocks"])
def test_a_foreign_processor_reads_the_views(side):
    network = stack(original())
    want = call(network)
    getattr(network, side)[0].attn.set_processor(Foreign())
    for made in calls(network).values():
        made.clear()
    close(call(network), want)
    counts = {name: len(made) for name, made in calls(network).items()}
    site = {"transformer_blocks": "attn.qkv", "single_transformer_blocks": "qkv_mlp"}[side]
    assert counts[f"{side}.0.{site}"] == {"attn.qkv": 3, "qkv_mlp": 4}[site]
    assert counts[f"{side}.1.{site}"] == 1


def test_a_foreign_processor_of_diffusers_gets_its_rows():
    """FluxIPAdapterAttnProcessor reads the fused projection, of the block's own input."""
    network = stack(original())
    want = call(network)
    processor = FluxIPAdapterAttnProcessor(WIDTH, WIDTH).double()
    network.single_transformer_blocks[0].attn.set_processor(processor)
    calls(network)[QKV_MLP[0]].clear()
    close(call(network), want)
    assert sorted(calls(network)[QKV_MLP[0]]) == [(0, 3 * WIDTH), (3 * WIDTH, 7 * WIDTH)]


def test_setting_the_plain_processor_again_shares_again():
    network = stack(original())
    network.set_attn_processor(FluxAttnProcessor())
    call(network)
    assert all(len(made) == 1 for made in calls(network).values())


def test_a_hook_around_the_attention_sees_the_activations():
    block = original().single_transformer_blocks[0]
    twin = stack(original()).single_transformer_blocks[0]
    x, temb = torch.randn(2, 3, WIDTH).double(), torch.randn(2, WIDTH).double()
    for module in (block, twin):
        attn = module.attn
        attn.forward = lambda hidden_states, **_: hidden_states  # as layer skipping does
    with torch.no_grad():
        for ours, theirs in zip(twin(x, x, temb), block(x, x, temb), strict=True):
            close(ours, theirs)


def test_an_attention_backend_is_honored(monkeypatch):
    want, network = call(original()), stack(original())
    seen, dispatch = [], transformer_flux.dispatch_attention_fn

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["backend"].value)
        return dispatch(*args, **kwargs)

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", spy)
    for block in (*network.transformer_blocks, *network.single_transformer_blocks):
        block.attn.set_attention_backend("_native_math")  # the network's would set it for everyone
    close(call(network), want)
    assert seen == ["_native_math"] * 4


def test_half_swapped_attentions_are_not_fused():
    network = stack(original(), leave="add_qkv")
    assert not network.transformer_blocks[0].attn.fused_projections
    assert isinstance(network.transformer_blocks[0].attn.to_q, SiteView)
    close(call(network), call(original()))
    network = stack(original(), leave="qkv_mlp")
    assert "forward" not in vars(network.single_transformer_blocks[0])
    close(call(network), call(original()))


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading_brings_every_site_in_time(monkeypatch, kind):
    network = quantize(original().float())
    want = call(network, torch.float32)
    names, brought = {module: name for name, module in network.named_modules()}, []
    bring = ModuleGroup.onload_

    def spy(group: ModuleGroup) -> None:
        brought.append(names[group.onload_leader])
        bring(group)

    monkeypatch.setattr(ModuleGroup, "onload_", spy)
    apply_group_offloading(network, torch.device("cpu"), offload_type=kind, num_blocks_per_group=1)
    assert torch.equal(call(network, torch.float32), want)
    blocks = [f"{s}transformer_blocks.{i}" for s in ("", "single_") for i in (0, 1)]
    for name in QKV + QKV_MLP if kind == "leaf_level" else blocks:
        assert brought.count(name) == 1, name


def test_the_whole_graph_is_captured():
    torch.compiler.reset()
    network = quantize(original().float())
    want = call(network, torch.float32)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    got = call(compiled, torch.float32)
    assert (got - want).norm() < 0.02 * want.norm()  # a code may round the other way


def test_blocks_are_found_by_their_class():
    torch.compiler.reset()
    network = quantize(original().float())
    want = call(network, torch.float32)
    network.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert all(block._compiled_call_impl for block in network.single_transformer_blocks)
    assert (call(network, torch.float32) - want).norm() < 0.02 * want.norm()


def test_a_packed_folder_loads_shared_and_saves_the_same_files(finished, tmp_path):
    folder = finished["pack"].tree("model") / "transformer"
    network = FluxTransformer2DModel.from_pretrained(folder)
    double, single = network.transformer_blocks[0].attn, network.single_transformer_blocks[0]
    assert double.fused_projections
    assert double.to_qkv.site is double.qkv
    assert double.to_added_qkv.site is double.add_qkv
    assert single.attn.to_qkv.site is single.qkv_mlp
    network.save_pretrained(tmp_path)
    again = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(call(again, torch.float32), call(network, torch.float32))
    (before,), (after,) = folder.glob("*.safetensors"), tmp_path.glob("*.safetensors")
    stored, saved = load_file(before), load_file(after)
    assert stored.keys() == saved.keys()
    assert all(torch.equal(stored[name], saved[name]) for name in stored)
