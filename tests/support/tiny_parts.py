"""Components of tiny pipelines: encoders, autoencoders and schedulers with random weights."""

from typing import Any

import diffusers
import tiny_line
import transformers
from tiny_tokenizers import clip_and_t5
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
ROTARY = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}


def t5(cls: Any = transformers.T5EncoderModel, config: Any = transformers.T5Config) -> Any:
    return cls(
        config(
            vocab_size=len(clip_and_t5()[1]),
            d_model=64,
            d_kv=32,
            d_ff=64,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def clip(width: int, cls: Any = transformers.CLIPTextModelWithProjection) -> Any:
    tokenizer = clip_and_t5()[0]
    return cls(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=tiny_line.POOLED,
        )
    )


def qwen_text(vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        **more,
    }


def flux2_autoencoder() -> Any:
    """8 x 8 pixels to one latent with 4 channels, four of which are a token's."""
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def autoencoder(**more: Any) -> Any:
    """8 x 8 pixels to one latent with 4 channels."""
    return diffusers.AutoencoderKL(
        sample_size=32,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        mid_block_add_attention=False,
        **more,
    )


def flow(**more: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**more)


def gemma(vocabulary: int, **more: Any) -> Any:
    return transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=64,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            **more,
        )
    )


def video_autoencoder(cls: Any, latent: int = 4, **more: Any) -> Any:
    config = {
        "base_dim": 8,
        "z_dim": latent,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "latents_mean": [0.0] * latent,
        "latents_std": [1.0] * latent,
    }
    return cls(**config | more)


def qwen25_vl(tokenizer: Any, **more: Any) -> Any:
    return transformers.Qwen2_5_VLConfig(
        text_config=qwen_text(len(tokenizer), rope_parameters=ROTARY, **more),
        vision_config=VISION | {"out_hidden_size": more["hidden_size"]},
        **_picture_tokens(tokenizer),
    )


def qwen3_vl(tokenizer: Any, **more: Any) -> Any:
    rotary = ROTARY | {"mrope_section": [6, 5, 5]}
    vision = VISION | {"out_hidden_size": more["hidden_size"], "deepstack_visual_indexes": []}
    return transformers.Qwen3VLConfig(
        text_config=qwen_text(len(tokenizer), rope_parameters=rotary, **more),
        vision_config=vision,
        **_picture_tokens(tokenizer),
    )


def _picture_tokens(tokenizer: Any) -> dict[str, int]:
    names = {"image": "image_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    known = tokenizer.get_vocab()
    return {
        f"{name}_token_id": known[token]
        for name, word in names.items()
        if (token := f"<|{word}|>") in known
    }


def picture_processor(cls: Any, tokenizer: Any, patch_size: int) -> Any:
    """A processor of texts and pictures.

    Without its part for videos, which needs torchvision; no pipeline calls it.
    """
    cls.get_attributes = staticmethod(lambda: ["image_processor", "tokenizer"])
    return cls(
        image_processor=Qwen2VLImageProcessorPil(patch_size=patch_size, merge_size=2),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
