"""Tiny pipelines of the models of 2026: encoders that read pictures, videos that have sound."""

import importlib
from typing import Any

import diffusers
import tiny_parts as parts
import transformers
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from tiny_families import HEADS, TINY, randomize
from tiny_line import build_transformer
from tiny_tokenizers import LONG_CAPTION, clip_and_t5, gemma_tokenizer, seeing_tokenizer

from dirotq.assets import tiny_flux

SIDE = 64
"""Pixels of a picture that an edit begins with."""


def qwen_image21() -> Any:
    tokenizer = seeing_tokenizer()
    return diffusers.QwenImage21Pipeline(
        scheduler=parts.flow(use_dynamic_shifting=True),
        vae=parts.video_autoencoder(
            diffusers.AutoencoderKLQwenImage21, latent=16, decoder_base_dim=8, dim_mult=[1] * 5
        ),
        text_encoder=transformers.Qwen3VLForConditionalGeneration(
            parts.qwen3_vl(tokenizer, hidden_size=64, num_hidden_layers=1, head_dim=32)
        ),
        processor=parts.picture_processor(transformers.Qwen3VLProcessor, tokenizer, patch_size=16),
        transformer=TINY["qwen_image21"].build(),
    )


def ideogram4() -> Any:
    """Its pipeline reads 13 layers of its encoder, the last of which is the 36th."""
    tokenizer = seeing_tokenizer()
    text = parts.qwen3_vl(tokenizer, hidden_size=16, num_hidden_layers=36, head_dim=32)
    made, config = TINY["ideogram4"], {"llm_features_dim": 13 * 16, "num_layers": 1}
    return diffusers.Ideogram4Pipeline(
        scheduler=parts.flow(),
        vae=parts.flux2_autoencoder(),
        text_encoder=transformers.Qwen3VLModel(text),
        tokenizer=tokenizer,
        transformer=made.build(**config),
        unconditional_transformer=made.build(seed=1, **config),
    )


def ltx2() -> Any:
    """The sound has 2 channels of 2 bins for each step in time, as its autoencoder leaves them."""
    tokenizer = gemma_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 1, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    connectors = {
        f"{kind}_connector_{name}": value
        for kind in ("video", "audio")
        for name, value in {**HEADS, "num_layers": 1, "num_learnable_registers": 8}.items()
    }
    return diffusers.LTX2Pipeline(
        scheduler=parts.flow(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLLTX2Video(
            latent_channels=4,
            block_out_channels=(8, 8),
            down_block_types=("LTX2VideoDownBlock3D",) * 2,
            decoder_block_out_channels=(8,),
            layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True, True),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatial", "temporal"),
            upsample_type=("spatiotemporal",),
            upsample_residual=(True,),
            upsample_factor=(2,),
            spatial_compression_ratio=8,
            temporal_compression_ratio=2,
        ),
        audio_vae=diffusers.AutoencoderKLLTX2Audio(
            base_channels=4, num_res_blocks=1, latent_channels=2, mel_bins=8
        ),
        text_encoder=transformers.Gemma3ForConditionalGeneration(
            transformers.Gemma3Config(text_config=text, vision_config=vision)
        ),
        tokenizer=tokenizer,
        connectors=randomize(
            LTX2TextConnectors(caption_channels=64, text_proj_in_factor=3, **connectors)
        ),
        transformer=TINY["ltx2"].build(num_layers=1),
        vocoder=LTX2Vocoder(
            in_channels=16,
            hidden_channels=8,
            upsample_kernel_sizes=[4],
            upsample_factors=[2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1]],
        ),
    )


def _edited(cls: Any) -> Any:
    # The pipeline drops the template's first 64 tokens, as of Qwen-Image.
    template = cls(None, None, None, None, None, None).prompt_template_encode
    tokenizer = seeing_tokenizer((*[template] * 4, LONG_CAPTION))
    # Of 384 or 1024 pixels, whatever the size of the image is to be: too many for a test.
    module: Any = importlib.import_module(cls.__module__)
    number = len(module.calculate_dimensions(SIDE**2, 1.0))
    module.calculate_dimensions = lambda *_: (SIDE, SIDE, None)[:number]
    config = parts.qwen25_vl(tokenizer, hidden_size=64, num_hidden_layers=1)
    return cls(
        scheduler=parts.flow(),
        vae=parts.video_autoencoder(diffusers.AutoencoderKLQwenImage),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        processor=parts.picture_processor(transformers.Qwen2VLProcessor, tokenizer, patch_size=14),
        transformer=TINY["qwen_image"].build(num_layers=1),
    )


def qwen_image_edit() -> Any:
    return _edited(diffusers.QwenImageEditPipeline)


def qwen_image_edit_plus() -> Any:
    return _edited(diffusers.QwenImageEditPlusPipeline)


def _flux(cls: Any, **changes: Any) -> Any:
    clip, t5 = clip_and_t5()
    return cls(
        scheduler=tiny_flux.build_scheduler(1.0),
        vae=tiny_flux.build_autoencoder(),
        text_encoder=tiny_flux.build_clip(clip),
        tokenizer=clip,
        text_encoder_2=tiny_flux.build_t5(t5),
        tokenizer_2=t5,
        transformer=build_transformer(**changes),
    )


def flux_kontext() -> Any:
    return _flux(diffusers.FluxKontextPipeline)


def flux_fill() -> Any:
    """Its transformer reads latents, those of the picture, and the mask: 16, 16 and 8 x 8."""
    return _flux(diffusers.FluxFillPipeline, in_channels=16 + 16 + 64, out_channels=16)
