"""Tiny pipelines around transformers that no family table describes: their sites are discovered."""

from typing import Any

import diffusers
import tiny_parts as parts
import torch
import transformers
from tiny_families import ROPE, randomize
from tiny_tokenizers import (
    LONG_CAPTION,
    clip_and_t5,
    gemma_tokenizer,
    seeing_tokenizer,
)
from tiny_transformers import UNTABLED

SHIFTLESS = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0}


def _transformer(cls: Any, **changes: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(cls(**UNTABLED[cls.__name__].config | changes))


def lumina2() -> Any:
    tokenizer = gemma_tokenizer()
    made = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=64,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=32,
        axes_dim_rope=ROPE,
        axes_lens=(64, 64, 64),
        cap_feat_dim=64,
    )
    return diffusers.Lumina2Pipeline(
        transformer=randomize(made),
        scheduler=parts.flow(shift=6.0),
        vae=parts.autoencoder(**SHIFTLESS),
        text_encoder=parts.gemma(len(tokenizer), num_hidden_layers=2),
        tokenizer=tokenizer,
    )


def chroma() -> Any:
    return diffusers.ChromaPipeline(
        scheduler=parts.flow(use_dynamic_shifting=True),
        vae=parts.autoencoder(**SHIFTLESS),
        text_encoder=parts.t5(),
        tokenizer=clip_and_t5()[1],
        transformer=_transformer(diffusers.ChromaTransformer2DModel, joint_attention_dim=64),
    )


def auraflow() -> Any:
    return diffusers.AuraFlowPipeline(
        tokenizer=clip_and_t5()[1],
        text_encoder=parts.t5(transformers.UMT5EncoderModel, transformers.UMT5Config),
        vae=parts.autoencoder(**SHIFTLESS),
        transformer=_transformer(diffusers.AuraFlowTransformer2DModel, joint_attention_dim=64),
        scheduler=parts.flow(shift=1.73),
    )


def cogview4() -> Any:
    # One that says where a text ends, as GLM's says where it begins: an empty one has tokens.
    tokenizer = clip_and_t5()[1]
    config = parts.qwen_text(len(tokenizer), hidden_size=64, num_hidden_layers=2, head_dim=32)
    return diffusers.CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.GlmModel(
            transformers.GlmConfig(**config, pad_token_id=tokenizer.pad_token_id)
        ),
        vae=parts.autoencoder(**SHIFTLESS),
        transformer=_transformer(diffusers.CogView4Transformer2DModel, text_embed_dim=64),
        scheduler=parts.flow(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75),
    )


def _glyphs() -> dict[str, Any]:
    """The encoder of what an image shows in writing, letter by letter."""
    config = transformers.T5Config(
        vocab_size=384, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    return {
        "text_encoder_2": transformers.T5EncoderModel(config),
        "tokenizer_2": transformers.ByT5Tokenizer(),
    }


def hunyuan_image() -> Any:
    # The pipeline drops the template's first 34 tokens: words have to be tokens, as in its own.
    empty = diffusers.HunyuanImagePipeline(None, None, None, None, None, None, None)
    tokenizer = seeing_tokenizer((*[empty.prompt_template_encode] * 4, LONG_CAPTION))
    config = parts.qwen25_vl(tokenizer, hidden_size=64, num_hidden_layers=3)
    return diffusers.HunyuanImagePipeline(
        scheduler=parts.flow(shift=5.0),
        vae=diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=8,
            sample_size=64,
            scaling_factor=1.0,
        ),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        **_glyphs(),
        transformer=_transformer(
            diffusers.HunyuanImageTransformer2DModel, text_embed_dim=64, patch_size=(1, 1)
        ),
        guider=diffusers.AdaptiveProjectedMixGuidance(),
    )


def hunyuan_video15() -> Any:
    """Its transformer reads latents, those of a first frame, and where that is given."""
    tokenizer = seeing_tokenizer()
    config = parts.qwen25_vl(tokenizer, hidden_size=64, num_hidden_layers=3).text_config
    return diffusers.HunyuanVideo15Pipeline(
        text_encoder=transformers.Qwen2_5_VLTextModel(config),
        tokenizer=tokenizer,
        transformer=_transformer(
            diffusers.HunyuanVideo15Transformer3DModel,
            in_channels=9,
            text_embed_dim=64,
            patch_size=1,
            patch_size_t=1,
            task_type="t2v",
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(32, 32, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=8,
            temporal_compression_ratio=4,
            scaling_factor=1.0,
        ),
        scheduler=parts.flow(shift=5.0),
        **_glyphs(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    )
