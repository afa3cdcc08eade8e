"""Discovery against the families' tables, and on architectures that have none."""

import copy
import json
import re
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from tiny_families import HEADS, ROPE, TINY, randomize
from torch import Tensor, nn

from dirotq.errors import UnsupportedError
from dirotq.models import discovery
from dirotq.models.call import Call
from dirotq.models.denoiser_call import denoiser_call
from dirotq.models.discovery import Discovered, discover
from dirotq.models.family import Site
from dirotq.models.flux import FLUX
from dirotq.models.skeleton import empty_transformer
from dirotq.packed.swap import swap_sites

from .contract import fused

WIDTH, TEXT = 64, 48
TOKENS = 5
IMAGE: dict[str, Any] = {"in_channels": 4, "out_channels": 4, **HEADS}
FRACTIONS = torch.tensor([0.3, 0.7])


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def call(*size: int, **more: Any) -> dict[str, Any]:
    """Arguments of one call for two images."""
    text, time = random(2, TOKENS, TEXT), torch.tensor([300, 700])
    start = {"hidden_states": random(2, *size), "encoder_hidden_states": text, "timestep": time}
    return start | more


def ltx() -> tuple[Any, dict[str, Any]]:
    config = {"cross_attention_dim": WIDTH, "num_layers": 2, "caption_channels": TEXT}
    frames = {"num_frames": 1, "height": 3, "width": 4}
    kwargs = call(12, 4, encoder_attention_mask=torch.ones(2, TOKENS), **frames)
    return diffusers.LTXVideoTransformer3DModel(**IMAGE, **config), kwargs


def aura_flow() -> tuple[Any, dict[str, Any]]:
    config = {"num_mmdit_layers": 2, "num_single_dit_layers": 2, "joint_attention_dim": TEXT}
    config |= {"sample_size": 8, "caption_projection_dim": WIDTH, "pos_embed_max_size": 16}
    return diffusers.AuraFlowTransformer2DModel(**IMAGE, **config), call(
        4, 8, 8, timestep=FRACTIONS
    )


def hunyuan_dit() -> tuple[Any, dict[str, Any]]:
    config = {"patch_size": 2, "sample_size": 8, "hidden_size": WIDTH, "num_layers": 4}
    config |= {"in_channels": 4, "mlp_ratio": 2.0, "activation_fn": "gelu-approximate", **HEADS}
    config |= {"cross_attention_dim": TEXT, "cross_attention_dim_t5": 32, "text_len": TOKENS}
    config |= {"text_len_t5": 6, "pooled_projection_dim": 16}
    config |= {"use_style_cond_and_image_meta_size": False}
    masks = {"text_embedding_mask": torch.ones(2, 5), "text_embedding_mask_t5": torch.ones(2, 6)}
    rope = get_2d_rotary_pos_embed(32, ((0, 0), (4, 4)), (4, 4), output_type="pt")
    more = {"encoder_hidden_states_t5": random(2, 6, 32), "image_rotary_emb": rope, **masks}
    return diffusers.HunyuanDiT2DModel(**config), call(4, 8, 8, timestep=300 * FRACTIONS, **more)


def hunyuan_video() -> tuple[Any, dict[str, Any]]:
    config = {"num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 2}
    config |= {"text_embed_dim": TEXT, "pooled_projection_dim": 16, "rope_axes_dim": ROPE}
    more = {"pooled_projections": random(2, 16), "guidance": 1000 * FRACTIONS}
    kwargs = call(4, 1, 8, 8, encoder_attention_mask=torch.ones(2, TOKENS), **more)
    return diffusers.HunyuanVideoTransformer3DModel(**IMAGE, **config), kwargs


def cogview4() -> tuple[Any, dict[str, Any]]:
    config = {"num_layers": 2, "text_embed_dim": TEXT, "time_embed_dim": 32, "condition_dim": 16}
    config |= {"pos_embed_max_size": 8, "sample_size": 8, "rope_axes_dim": (16, 16)}
    sizes = dict.fromkeys(("original_size", "target_size", "crop_coords"), torch.full((2, 2), 64))
    return diffusers.CogView4Transformer2DModel(**IMAGE, **config), call(4, 8, 8, **sizes)


def lumina2() -> tuple[Any, dict[str, Any]]:
    config = {"sample_size": 8, "in_channels": 4, "hidden_size": 96, "cap_feat_dim": TEXT}
    config |= {"num_layers": 2, "num_refiner_layers": 1, "multiple_of": 32, "axes_dim_rope": ROPE}
    config |= {"num_attention_heads": 3, "num_kv_heads": 1, "axes_lens": (64, 64, 64)}
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    kwargs = call(4, 8, 8, timestep=FRACTIONS, encoder_attention_mask=mask)
    return diffusers.Lumina2Transformer2DModel(**config), kwargs


def hidream() -> tuple[Any, dict[str, Any]]:
    config = {"num_layers": 1, "num_single_layers": 1, "patch_size": 2, "max_resolution": (8, 8)}
    config |= {"num_routed_experts": 4, "num_activated_experts": 2, "llama_layers": [0, 1]}
    config |= {"caption_channels": [TEXT, TEXT], "text_emb_dim": 16, "axes_dims_rope": (16, 8, 8)}
    return diffusers.HiDreamImageTransformer2DModel(**IMAGE, **config), {
        "hidden_states": random(2, 4, 8, 8),
        "timesteps": torch.tensor([300, 700]),
        "encoder_hidden_states_t5": random(2, TOKENS, TEXT),
        "encoder_hidden_states_llama3": random(2, 2, TOKENS, TEXT),
        "pooled_embeds": random(2, 16),
    }


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
    ltx: under("transformer_blocks.*", CROSS),
    aura_flow: under("joint_transformer_blocks.*", f"{DOUBLE} {GATED}")
    | under("joint_transformer_blocks.*", GATED.replace("ff.", "ff_context."))
    | under("single_transformer_blocks.*", f"norm1.linear! {QKV} {GATED}"),
    hunyuan_dit: under("blocks.*", f"{CROSS} norm1.linear! skip_linear"),
    hunyuan_video: under("transformer_blocks.*", f"{DOUBLE} {MLP}")
    | under("transformer_blocks.*", MLP.replace("ff.", "ff_context."))
    | under("context_embedder.token_refiner.refiner_blocks.*", f"{QKV} {MLP} norm_out.linear!")
    # Its attention joins image and text anew, so the MLP's input is another tensor than q, k, v's.
    | under("single_transformer_blocks.*", "attn.shared_to_q_to_k_to_v proj_mlp proj_out")
    | under("single_transformer_blocks.*", "norm.linear!"),
    # Its MLP runs twice in a call: for the image and for the text.
    cogview4: under("transformer_blocks.*", f"norm1.linear! {MLP}")
    | under("transformer_blocks.*", QKV.replace("attn.", "attn1.")),
    lumina2: under("layers.*", f"norm1.linear! {LUMINA}")
    | under("noise_refiner.*", f"norm1.linear! {LUMINA}")
    | under("context_refiner.*", LUMINA),
    hidream: under("double_stream_blocks.*.block", f"{HIDREAM} {TEXT_STREAM}")
    | under("single_stream_blocks.*.block", HIDREAM),
}
DATA_DEPENDENT = (lumina2, hidream)
FLAGS = {"flux": {"guidance_embeds": True}}
everyone = pytest.mark.parametrize("architecture", UNKNOWN, ids=lambda make: make.__name__)


def made(architecture: Any) -> tuple[Any, tuple[()], dict[str, Any]]:
    """In float64: what it computes with and without sites is then the same to many digits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, kwargs = architecture()
    wide = Call((), kwargs).map(lambda t: t.double() if t.is_floating_point() else t)
    return randomize(network).double(), (), wide.kwargs


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
    tables = TINY[name].family.sites(network)
    assert {content(site) for site in discovered.sites} == {content(s) for s in tables if s.block}


@everyone
def test_the_sites_of_an_unknown_architecture(architecture):
    network, *call = made(architecture)
    discovered = discover(network, *call)
    assert found(discovered) == {pattern(name) for name in UNKNOWN[architecture]}
    consumers = [consumer for site in discovered.sites for consumer in site.linears]
    linears = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert len(consumers) == len(set(consumers))
    assert set(consumers).isdisjoint(discovered.kept)
    assert linears <= {*consumers, *discovered.kept}
    for site in discovered.sites:
        for consumer, rows in zip(site.linears, site.out_features, strict=True):
            assert network.get_submodule(consumer).weight.shape == (rows, site.in_features)
            assert (network.get_submodule(consumer).bias is not None) == site.bias


@everyone
@torch.no_grad()
def test_sites_can_be_swapped(architecture):
    network, args, kwargs = made(architecture)
    want = network(**kwargs).sample
    sites = discover(network, args, kwargs).sites
    names = {name for name, _ in network.named_modules()}
    assert not {site.name for site in sites if len(site.linears) > 1} & names
    swap_sites(network, sites, lambda site: fused(network, site))
    assert (network(**kwargs).sample - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("architecture", [a for a in UNKNOWN if a not in DATA_DEPENDENT])
def test_shapes_alone_show_the_same(architecture):
    network, *call = made(architecture)
    real = discover(network, *call)
    assert discover(copy.deepcopy(network).to("meta"), *call) == real
    # A skeleton: parameters without memory, buffers with it.
    skeleton = empty_transformer(dict(network.config), type(network))
    assert discover(skeleton.double(), *call) == real


@pytest.mark.parametrize("architecture", DATA_DEPENDENT)
def test_control_flow_that_depends_on_data_is_refused_without_data(architecture):
    network, *call = made(architecture)
    with pytest.raises(UnsupportedError, match=r"describes \w+2DModel.*meta device.*real weights"):
        discover(network.to("meta"), *call)


def test_what_stays_is_told_with_its_reason():
    discovered = discover(*made(ltx))
    assert discovered.kept["transformer_blocks.1.attn2.to_k"] == discovery.ACROSS
    assert discovered.kept["proj_out"] == discovery.OUTSIDE
    note = f"transformer_blocks.*.attn2.to_k (2) stays in 16 bits: {discovery.ACROSS}"
    assert discovered.notes == [note, note.replace("to_k", "to_v")]
    kept = discover(*made(hidream)).kept
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


def test_encoders_that_need_data_run_with_their_weights(folder, monkeypatch):
    def needs_data(model: Any) -> Any:
        run = model.forward
        model.forward = lambda ids, *a, **k: run(ids, *a, **k) if ids.sum().item() else None
        return model

    monkeypatch.setattr("dirotq.models.denoiser_call._shapes_only", needs_data)
    text = denoiser_call(folder)[1]["encoder_hidden_states"]
    assert text.dtype == torch.float32
    assert text.any()


def test_a_pipeline_that_stops_early_is_refused_with_both_reasons(own_folder):
    with pytest.raises(UnsupportedError, match=r"Provide either .*on the CPU: .*Provide either"):
        denoiser_call(own_folder, prompt=None)
    (own_folder / "model_index.json").write_text('{"_class_name": "NobodysPipeline"}')
    with pytest.raises(UnsupportedError, match=r"no attribute NobodysPipeline"):
        denoiser_call(own_folder)
