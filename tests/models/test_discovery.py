"""Discovery against the families' tables, and on architectures that have none."""

import copy
import json
import re
from typing import Any

import diffusers
import pytest
import torch
from fused_sites import fused
from tiny_families import TINY
from tiny_transformers import made
from torch import Tensor, nn

from dirotq.errors import UnsupportedError
from dirotq.models import discovery, hollow
from dirotq.models.denoiser_call import denoiser_call
from dirotq.models.discovery import Discovered, discover
from dirotq.models.family import Site
from dirotq.models.flux import FLUX
from dirotq.models.skeleton import empty_transformer
from dirotq.packed.swap import swap_sites


def under(path: str, sites: str) -> set[str]:
    """Paths of sites below a block; ``!`` marks a modulator."""
    return {f"{path}.{site}" for site in sites.split()}


QKV = "attn.shared_to_q_to_k_to_v attn.to_out.0"
DOUBLE = f"norm1.linear! norm1_context.linear! {QKV} attn.to_add_out"
DOUBLE += " attn.shared_add_k_proj_add_v_proj_add_q_proj"
MLP = "ff.net.0.proj ff.net.2"
CROSS = f"attn1.shared_to_q_to_k_to_v attn1.to_out.0 attn2.to_q attn2.to_out.0 {MLP}"
GATED = "ff.shared_linear_1_linear_2 ff.out_projection"
LUMINA = f"{QKV} feed_forward.shared_linear_1_linear_3 feed_forward.linear_2"
HIDREAM = "adaLN_modulation.1! attn1.shared_to_q_to_k_to_v attn1.to_out "
HIDREAM += "ff_i.shared_experts.shared_w1_w3 ff_i.shared_experts.w2 "
HIDREAM += "ff_i.experts.*.shared_w1_w3 ff_i.experts.*.w2"
TEXT_STREAM = "attn1.shared_to_q_t_to_k_t_to_v_t attn1.to_out_t ff_t.shared_w1_w3 ff_t.w2"
UNKNOWN = {
    "LTXVideoTransformer3DModel": under("transformer_blocks.*", CROSS),
    "AuraFlowTransformer2DModel": under("joint_transformer_blocks.*", f"{DOUBLE} {GATED}")
    | under("joint_transformer_blocks.*", GATED.replace("ff.", "ff_context."))
    | under("single_transformer_blocks.*", f"norm1.linear! {QKV} {GATED}"),
    "HunyuanDiT2DModel": under("blocks.*", f"{CROSS} norm1.linear! skip_linear"),
    "HunyuanVideoTransformer3DModel": under("transformer_blocks.*", f"{DOUBLE} {MLP}")
    | under("transformer_blocks.*", MLP.replace("ff.", "ff_context."))
    | under("context_embedder.token_refiner.refiner_blocks.*", f"{QKV} {MLP} norm_out.linear!")
    # Its attention joins image and text anew, so the MLP's input is another tensor than q, k, v's.
    | under("single_transformer_blocks.*", "attn.shared_to_q_to_k_to_v proj_mlp proj_out")
    | under("single_transformer_blocks.*", "norm.linear!"),
    # Its MLP runs twice in a call: for the image and for the text.
    "CogView4Transformer2DModel": under("transformer_blocks.*", f"norm1.linear! {MLP}")
    | under("transformer_blocks.*", QKV.replace("attn.", "attn1.")),
    "Lumina2Transformer2DModel": under("layers.*", f"norm1.linear! {LUMINA}")
    | under("noise_refiner.*", f"norm1.linear! {LUMINA}")
    | under("context_refiner.*", LUMINA),
    "HiDreamImageTransformer2DModel": under(
        "double_stream_blocks.*.block", f"{HIDREAM} {TEXT_STREAM}"
    )
    | under("single_stream_blocks.*.block", HIDREAM),
}
FLAGS = {"flux": {"guidance_embeds": True}}
everyone = pytest.mark.parametrize("architecture", UNKNOWN)


def pattern(name: str) -> str:
    return re.sub(r"\.\d+", ".*", name)


def found(discovered: Discovered) -> set[str]:
    mark = {"block": "", "modulator": "!"}
    return {pattern(site.name + mark[site.kind]) for site in discovered.sites}


def content(site: Site) -> tuple[Any, ...]:
    """Everything but its name, the order of its consumers, and what masks say."""
    rows = frozenset(zip(site.linears, site.out_features, strict=True))
    return rows, site.in_features, site.kind, site.bias, site.pointwise


@pytest.mark.parametrize("name", TINY)
def test_a_table_says_the_same(name):
    network = TINY[name].build(**FLAGS.get(name, {}))
    discovered = discover(network, (), TINY[name].inputs())
    # But for keys and values of the text: ACROSS.
    tables = [s for s in TINY[name].family.sites(network) if s.kind == "block" or not s.text]
    assert {content(site) for site in discovered.sites} == {content(s) for s in tables if s.block}


@everyone
def test_the_sites_of_an_unknown_architecture(architecture):
    network, inputs = made(architecture)
    seen = discover(network, (), inputs)
    assert found(seen) == {pattern(name) for name in UNKNOWN[architecture]}
    assert discover(copy.deepcopy(network).to("meta"), (), inputs) == seen


@pytest.mark.parametrize(
    "architecture",
    [
        "CogView4Transformer2DModel",
        "LTXVideoTransformer3DModel",
        "Lumina2Transformer2DModel",
        "Kandinsky6SRTransformer3DModel",
    ],
)
def test_made_up_numbers_show_the_same(architecture, monkeypatch):
    network, inputs = made(architecture)
    seen = discover(network, (), inputs)
    monkeypatch.setattr(hollow, "COSTLY", 0)
    monkeypatch.setattr(hollow, "LARGE", 64)
    assert discover(network, (), inputs) == seen


def seen(architecture: str) -> Discovered:
    network, inputs = made(architecture)
    return discover(network, (), inputs)


def test_what_stays_is_told_with_its_reason():
    discovered = seen("LTXVideoTransformer3DModel")
    assert discovered.kept["transformer_blocks.1.attn2.to_k"] == discovery.ACROSS
    assert discovered.kept["proj_out"] == discovery.OUTSIDE
    note = f"transformer_blocks.*.attn2.to_k (2) stays in 16 bits: {discovery.ACROSS}"
    assert discovered.notes == [note, note.replace("to_k", "to_v")]
    kept = seen("HiDreamImageTransformer2DModel").kept
    assert kept["double_stream_blocks.0.block.ff_i.gate.weight"] == discovery.PARAMETER
    assert kept["caption_projection.0.linear"] == discovery.UNMIXED


class Block(nn.Module):
    """An attention, and then ``rest(block, x)``, which has the linears ``more``."""

    def __init__(self, rest: Any = lambda _, x: x, **more: Any) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=bias) for bias in (True, True, False))
        for name, make in more.items():
            setattr(self, name, make())
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        x = x + nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.rest(self, x)


class Toy(nn.Module):
    def __init__(self, *rest: Any, **more: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(*rest, **more) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def trace(network: nn.Module) -> Discovered:
    return discover(network, (torch.randn(2, 4, 8),), {})


def linear() -> nn.Linear:
    return nn.Linear(8, 8)


def test_a_group_is_split_by_bias():
    shared, alone, *_ = trace(Toy()).sites
    assert (shared.name, shared.bias) == ("blocks.0.shared_q_k", True)
    assert (alone.name, alone.bias) == ("blocks.0.v", False)
    assert trace(Toy(shared_q_k=linear)).sites[0].name == "blocks.0.shared_q_k_"


def frees(block: Any, x: Tensor) -> Tensor:
    return block.a(x * 2) + block.b(x * 3)


def writes(block: Any, x: Tensor) -> Tensor:
    first = block.a(x)
    x.mul_(2)
    return first + block.b(x)


@pytest.mark.parametrize("rest", [frees, writes])
def test_memory_used_anew_is_another_activation(rest):
    names = [site.name for site in trace(Toy(rest, a=linear, b=linear)).sites]
    assert names[2:4] == ["blocks.0.a", "blocks.0.b"]


def test_linears_called_twice_share_when_both_calls_do():
    def twice(block: Any, x: Tensor) -> Tensor:
        halves = x[:, :2], x[:, 2:]
        return torch.cat([block.a(h) * block.b(h) for h in halves], 1) + block.c(halves[0]).sum()

    names = [site.name for site in trace(Toy(twice, a=linear, b=linear, c=linear)).sites]
    assert names[2:4] == ["blocks.0.shared_a_b", "blocks.0.c"]


def test_a_shared_site_lies_beside_a_container_not_in_it():
    network = Toy(
        lambda block, x: x + block.pair[0](x) * block.pair[1](x),
        pair=lambda: nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]),
    )
    sites = trace(network).sites
    assert sites[2].name == "blocks.0.shared_pair_0_pair_1"
    network, x = network.double(), torch.randn(2, 4, 8).double()
    want = network(x)
    swap_sites(network, sites, lambda site: fused(network, site))
    assert len(network.blocks[0].pair) == 2
    torch.testing.assert_close(network(x), want, rtol=1e-9, atol=1e-9)


def test_one_row_per_sample_is_a_modulator_even_if_all_blocks_read_it():
    class Modulated(Toy):
        def forward(self, x: Tensor, temb: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x) + block.mod(temb)[:, None]
            return x

    found = discover(Modulated(mod=linear), (torch.randn(2, 4, 8), torch.randn(2, 8)), {})
    modulators = [site.name for site in found.sites if site.kind == "modulator"]
    assert modulators == ["blocks.0.mod", "blocks.1.mod"]


def test_what_cannot_be_swapped_is_named_with_its_reason():
    def odd(block: Any, x: Tensor) -> Tensor:
        return nn.functional.linear(x, block.around.weight) @ block.raw["weight"]

    raw = lambda: nn.ParameterDict({"weight": nn.Parameter(torch.eye(8))})  # noqa: E731
    kept = trace(Toy(odd, idle=linear, around=linear, raw=raw)).kept
    assert {name: why for name, why in kept.items() if name.startswith("blocks.0")} == {
        "blocks.0.idle": discovery.UNCALLED,
        "blocks.0.around": discovery.BYPASSED,
        "blocks.0.raw.weight": discovery.PARAMETER,
    }


def test_a_slice_or_transpose_of_a_parameter_is_the_parameter():
    def odd(block: Any, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, block.fused.weight[:8]) @ block.experts["w"][1].mT
        return torch.einsum("btd,nd->btn", x, block.experts["w"][0])

    stacked = lambda: nn.ParameterDict({"w": nn.Parameter(torch.randn(2, 8, 8))})  # noqa: E731
    kept = trace(Toy(odd, fused=lambda: nn.Linear(8, 24), experts=stacked)).kept
    assert kept["blocks.1.fused"] == discovery.BYPASSED
    assert kept["blocks.1.experts.w"] == discovery.PARAMETER


def test_control_flow_that_depends_on_data_of_the_call_is_followed():
    def masked(block: Any, x: Tensor) -> Tensor:
        tokens = block.a(x[:, : int((x[0, :, 0] > 0).sum()) + 1])  # how many, the data say
        return block.b(tokens).sum(1, keepdim=True) + x

    names = [site.name for site in trace(Toy(masked, a=linear, b=linear)).sites]
    assert names[2:4] == ["blocks.0.a", "blocks.0.b"]


def test_what_is_denoised_counts_the_samples():
    class Tokens(Toy):
        def forward(self, ids: Tensor, x: Any, temb: Tensor) -> Tensor:
            x = torch.stack(x) if isinstance(x, list) else x
            for block in self.blocks:
                x = block(x) + block.mod(temb)[:, None]
            return x

    ids, x, temb = torch.arange(9), torch.randn(2, 4, 8), torch.randn(2, 8)
    for given in (x, list(x)):
        sites = discover(Tokens(mod=linear), (ids, given, temb), {}).sites
        kinds = {site.name: site.kind for site in sites}
        assert kinds["blocks.0.mod"] == "modulator"
        assert kinds["blocks.0.shared_q_k"] == "block"


def test_a_dtype_may_be_read_and_asked_for():
    network = Toy(lambda block, x: block.a(x.to(block.a.weight.dtype)), a=linear)
    network._keep_in_fp32_modules = ["v"]
    assert "blocks.0.a" in [site.name for site in trace(network).sites]
    assert trace(network).kept["blocks.0.v"] == discovery.EXACT


def test_a_network_without_blocks_or_whose_forward_fails_is_refused_with_the_reason():
    with pytest.raises(UnsupportedError, match=r"Linear, .*shows no linear.*1 of 1: lies outside"):
        trace(nn.Linear(8, 8))
    with pytest.raises(UnsupportedError, match=r"Toy.*failed with RuntimeError: .*8x8"):
        discover(Toy(), (torch.randn(2, 4, 7),), {})


def test_the_transformer_is_left_as_it_was():
    network = Toy()
    trace(network)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.modules())
    meta = Toy().to("meta")
    meta.register_buffer("table", torch.ones(3))
    trace(meta)
    assert meta.table.device.type == "cpu"


def test_a_pipeline_shows_its_denoisers_arguments(folder):
    args, kwargs = denoiser_call(folder, height=32, max_sequence_length=8)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert kwargs["hidden_states"].shape[2] == config["in_channels"]
    assert kwargs["encoder_hidden_states"].shape == (1, 8, config["joint_attention_dim"])
    skeleton = empty_transformer(config, diffusers.FluxTransformer2DModel)
    sites = {content(site) for site in discover(skeleton, args, kwargs).sites}
    assert sites == {content(site) for site in FLUX.sites(skeleton)}


def test_no_weights_are_read_where_shapes_do(own_folder):
    for file in own_folder.glob("*/*.safetensors"):
        file.unlink()
    assert denoiser_call(own_folder)[1]["encoder_hidden_states"].shape[0] == 1


def test_encoders_that_need_data_run_with_noise_for_weights_or_are_loaded(own_folder, monkeypatch):
    def needs_data(model: Any) -> Any:
        run = model.forward
        model.forward = lambda ids, *a, **k: run(ids, *a, **k) if ids.sum().item() else None
        return model

    def needs_weights(_: Any) -> Any:
        raise RuntimeError("noise is no weight")

    monkeypatch.setattr("dirotq.models.denoiser_call._shapes_only", needs_data)
    with monkeypatch.context() as patch:
        patch.setattr("dirotq.models.denoiser_call.hollow", needs_weights)
        loaded = denoiser_call(own_folder)[1]["encoder_hidden_states"]
    for file in own_folder.glob("*/*.safetensors"):
        file.unlink()
    noise = denoiser_call(own_folder)[1]["encoder_hidden_states"]
    for text in (loaded, noise):
        assert text.dtype == torch.float32
        assert text.any()
    assert not torch.equal(loaded, noise)


def test_a_pipeline_that_stops_early_is_refused_with_each_reason(own_folder):
    with pytest.raises(
        UnsupportedError,
        match=r"meta device: .*Provide either .*noise for weights: .*loaded: .*Provide either",
    ):
        denoiser_call(own_folder, prompt=None)
    (own_folder / "model_index.json").write_text('{"_class_name": "NobodysPipeline"}')
    with pytest.raises(UnsupportedError, match=r"no attribute NobodysPipeline"):
        denoiser_call(own_folder)
