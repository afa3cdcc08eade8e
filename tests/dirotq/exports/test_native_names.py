"""diffusers' own converters undo the renaming: they are the other publication of both namings."""

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils

from dirotq.errors import UnsupportedError
from dirotq.exports.layers import native_layers
from dirotq.models.families import known_family
from dirotq.models.skeleton import empty_transformer

# FLUX.1's converter knows the published width only: on the meta device that costs nothing.
CONVERTERS = {
    "FluxTransformer2DModel": (
        single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
        {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True},
    ),
    "Flux2Transformer2DModel": (
        single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
        {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2},
    ),
    "ZImageTransformer2DModel": (
        single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
        {"n_layers": 2, "n_refiner_layers": 1},
    ),
    "QwenImageTransformer2DModel": (lambda checkpoint: checkpoint, {"num_layers": 2}),
}


def skeleton(name, config):
    return empty_transformer(config, getattr(diffusers, name))


@pytest.mark.parametrize("name", CONVERTERS)
def test_converters_of_diffusers_undo_it(name):
    convert, config = CONVERTERS[name]
    # Every row has a number of its own: also the order of rows is seen.
    state, start = {}, 0
    for key, tensor in skeleton(name, config).state_dict().items():
        rows = tensor.shape[0]
        state[key] = torch.arange(start, start + rows, dtype=torch.int32)
        start += rows
    _, kept = native_layers(name, [], state)
    native = {}
    for tensor in kept:
        joined = torch.cat([state[stored] for stored in tensor.stored])
        native[tensor.native] = torch.cat(joined.chunk(2)[::-1]) if tensor.swapped else joined
    assert len(native) == len(kept)
    back = convert(dict(native))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def entries_of(name, config):
    from tiny_spec import tiny_spec

    transformer = skeleton(name, config)
    sites = known_family(name).sites(transformer)
    inside = {linear for site in sites for linear in site.linears}
    kept = [key for key in transformer.state_dict() if key.rpartition(".")[0] not in inside]
    specs = [tiny_spec(dim=site.in_features, rows=site.out_features) for site in sites]
    return list(zip(sites, specs, strict=True)), kept


def test_sites_are_split_where_native_linears_are_apart():
    entries, kept = entries_of("QwenImageTransformer2DModel", {"num_layers": 1})
    layers, _ = native_layers("QwenImageTransformer2DModel", entries, kept)
    rows = {layer.native: layer.rows for layer in layers}
    width = rows["transformer_blocks.0.attn.to_q"].stop
    assert rows["transformer_blocks.0.attn.to_v"] == slice(2 * width, 3 * width)
    entries, kept = entries_of(
        "ZImageTransformer2DModel", {"n_layers": 1, "n_refiner_layers": 1, "dim": 256, "n_heads": 2,
        "n_kv_heads": 2, "axes_dims": [32, 48, 48]},
    )  # fmt: skip
    layers, _ = native_layers("ZImageTransformer2DModel", entries, kept)
    rows = {layer.native: layer.rows for layer in layers}
    assert rows["layers.0.attention.qkv"] == slice(0, 768)
    assert rows["layers.0.feed_forward.w1"].stop == rows["layers.0.feed_forward.w3"].start


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "Flux2Transformer2DModel"])
def test_every_fused_linear_is_one_site(name):
    entries, kept = entries_of(name, CONVERTERS[name][1])
    layers, _ = native_layers(name, entries, kept)
    assert len(layers) == len(entries)
    assert all(layer.rows == slice(0, sum(layer.site.out_features))
               for layer in layers)  # fmt: skip


def test_a_fused_linear_that_is_partly_packed():
    name = "FluxTransformer2DModel"
    entries, kept = entries_of(name, {"num_layers": 1, "num_single_layers": 1})
    whole = next(i for i, (site, _) in enumerate(entries) if site.name.endswith("qkv_mlp"))
    site, spec = entries[whole]
    part = type(site)(site.name, site.linears[:3], site.in_features, site.out_features[:3],
                      site.kind, site.bias)  # fmt: skip
    entries[whole] = (part, spec)
    mlp = "single_transformer_blocks.0.proj_mlp"
    with pytest.raises(UnsupportedError, match=r"single_blocks.0.linear1 is one linear.*pack them"):
        native_layers(name, entries, [*kept, f"{mlp}.weight", f"{mlp}.bias"])


def test_a_family_without_native_names():
    with pytest.raises(UnsupportedError, match=r"PixArtTransformer2DModel has no native.*flux"):
        native_layers("PixArtTransformer2DModel", [], [])


def test_a_module_without_a_native_name():
    with pytest.raises(UnsupportedError, match=r"something\.new .* has no native name"):
        native_layers("FluxTransformer2DModel", [], ["something.new.weight"])
