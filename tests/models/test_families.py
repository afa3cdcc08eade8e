"""Every family's table against its transformer, tiny and random."""

import inspect

import diffusers
import pytest
import tiny_line
import torch
from tiny_families import TINY, TinyFamily

from dirotq.errors import UnsupportedError
from dirotq.models.families import FAMILIES, family_of, known_family
from dirotq.models.sana import SANA
from dirotq.models.z_image import Z_IMAGE

from .contract import FamilyContract

PIPELINE_OF = {
    "flux": "FluxPipeline",
    "flux2": "Flux2Pipeline",
    "pixart": "PixArtSigmaPipeline",
    "sana": "SanaPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "qwen_image": "QwenImagePipeline",
    "z_image": "ZImagePipeline",
    "wan": "WanPipeline",
    "qwen_image21": "QwenImage21Pipeline",
    "krea2": "Krea2Pipeline",
    "ideogram4": "Ideogram4Pipeline",
    "hunyuan_video": "HunyuanVideoPipeline",
    "ltx2": "LTX2Pipeline",
}


class Tiny(FamilyContract):
    """The contract on one row of TINY."""

    tiny: TinyFamily

    def __init_subclass__(cls, name: str) -> None:
        cls.tiny = TINY[name]
        cls.family = cls.tiny.family
        cls.text_tokens, cls.tolerance = cls.tiny.tokens, cls.tiny.tolerance

    def transformer(self):
        return self.tiny.build()

    def inputs(self):
        return self.tiny.inputs()


class TestFlux2(Tiny, name="flux2"): ...


class TestPixArt(Tiny, name="pixart"): ...


class TestSana(Tiny, name="sana"): ...


class TestSD3(Tiny, name="sd3"): ...


class TestQwenImage(Tiny, name="qwen_image"): ...


class TestZImage(Tiny, name="z_image"): ...


class TestWan(Tiny, name="wan"): ...


class TestQwenImage21(Tiny, name="qwen_image21"): ...


class TestKrea2(Tiny, name="krea2"): ...


class TestIdeogram4(Tiny, name="ideogram4"): ...


class TestHunyuanVideo(Tiny, name="hunyuan_video"): ...


class TestLTX2(Tiny, name="ltx2"): ...


def test_every_family_has_a_tiny_transformer():
    assert [tiny.family for tiny in TINY.values()] == list(FAMILIES)
    assert [tiny.family.name for tiny in TINY.values()] == list(TINY)


def test_no_parameter_is_zero():
    for name, tiny in TINY.items():
        for parameter, value in tiny.build().named_parameters():
            assert value.abs().max() > 0, f"{name}: {parameter}"


def names(name: str, **changes) -> set[str]:
    return {site.name for site in TINY[name].family.sites(TINY[name].build(**changes))}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("flux", {"guidance_embeds": True}),
        ("flux", {"in_channels": 384, "out_channels": 64}),  # Fill
        ("flux2", {"guidance_embeds": False}),  # klein
        ("sana", {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}),  # Sprint
        ("qwen_image", {"zero_cond_t": True}),  # Edit
        ("wan", {"image_dim": 32, "added_kv_proj_dim": 64}),  # image to video
        ("hunyuan_video", {"guidance_embeds": False, "image_condition_type": "token_replace"}),
        ("ltx2", {"gated_attn": True, "audio_gated_attn": True, "ff_bias": False}),  # 2.5
    ],
)
def test_variants_have_the_same_sites(name, changes):
    assert names(name, **changes) == names(name)


def test_dual_attention_and_the_last_block_of_sd3():
    found = names("sd3")
    assert "transformer_blocks.0.attn2.qkv" in found
    assert "transformer_blocks.1.attn2.qkv" not in found
    assert "transformer_blocks.1.attn.to_add_out" in found
    assert "transformer_blocks.2.attn.to_add_out" not in found
    assert "transformer_blocks.2.ff_context.net.2" not in found
    assert names("sd3", dual_attention_layers=(), qk_norm=None) < found


def test_shared_modulation_lies_outside_of_the_blocks():
    shared = {
        name: [s.name for s in tiny.family.sites(tiny.build()) if not s.block]
        for name, tiny in TINY.items()
    }
    assert shared["flux"] == shared["sd3"] == shared["qwen_image"] == shared["z_image"] == []
    assert shared["flux2"] == [
        "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.linear",
        "single_stream_modulation.linear",
    ]
    assert shared["pixart"] == ["adaln_single.linear"]
    assert shared["sana"] == ["time_embed.linear"]
    assert shared["wan"] == ["condition_embedder.time_proj"]
    assert shared["krea2"] == ["time_mod_proj"]
    assert shared["qwen_image21"] == ["modulation.1"]
    assert shared["ideogram4"] == shared["hunyuan_video"] == []
    assert len(shared["ltx2"]) == 6


def test_convolutions_of_sana_are_sites():
    sites = TINY["sana"].family.sites(TINY["sana"].build())
    found = {
        s.name: (s.linears, s.in_features, s.out_features, s.bias) for s in sites if s.pointwise
    }
    ff = "transformer_blocks.0.ff"
    assert len(found) == 4
    assert found[f"{ff}.inverted"] == ((f"{ff}.conv_inverted",), 64, (320,), True)
    assert found[f"{ff}.point"] == ((f"{ff}.conv_point",), 160, (64,), False)


def test_unknown_classes_name_the_known_families():
    assert known_family("UNet2DConditionModel") is None
    with pytest.raises(UnsupportedError, match=r"described are flux \(.*, wan \(WanTransformer3D"):
        family_of("UNet2DConditionModel")


REAL = {
    "flux": {"guidance_embeds": True},
    "flux2": {},
    "pixart": {"sample_size": 128, "caption_channels": 4096, "use_additional_conditions": False},
    "sana": {},
    "sd3": {"num_attention_heads": 38, "caption_projection_dim": 2432},  # 3.5 large
    "qwen_image": {},
    "z_image": {},
    "wan": {},
    "qwen_image21": {},
    "krea2": {},
    "ideogram4": {},
    "hunyuan_video": {},
    "ltx2": {},
}
"""Widths of the published models."""


@pytest.fixture(scope="module")
def methods():
    return [tiny_line.method(name) for name in tiny_line.METHODS]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_method_fits_the_published_widths(family, methods):
    shallow = {"n_layers": 1, "n_refiner_layers": 1} if family is Z_IMAGE else {"num_layers": 1}
    if family.name in ("flux", "flux2", "hunyuan_video"):
        shallow["num_single_layers"] = 1
    with torch.device("meta"):
        transformer = getattr(diffusers, family.transformer)(**REAL[family.name] | shallow)
    halved = set()
    for site in family.sites(transformer):
        for method in methods:
            spec = method.spec(site, 64)
            if spec is None:  # keys and values of a text, without method.text_group
                assert (site.kind, site.text) == ("modulator", True)
                continue
            if spec.activations.group != method.activations.group:
                halved.add((site.in_features, spec.activations.group))
    assert halved == ({(5600, 32)} if family is SANA else set())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_defaults_are_arguments_of_a_pipeline(family):
    pipeline = getattr(diffusers, PIPELINE_OF[family.name])
    assert set(family.call) <= set(inspect.signature(pipeline.__call__).parameters)
    assert {"num_inference_steps", "height", "width"} <= set(family.call)
