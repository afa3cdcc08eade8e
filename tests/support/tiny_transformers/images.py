"""Transformers that make images."""

from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed

from .row import (
    AXES,
    FRACTIONS,
    HEADS,
    LATENT,
    POOLED,
    ROPE,
    SMALL,
    TEXT,
    TOKENS,
    WIDTH,
    Row,
    call,
    flag,
    mask,
    random,
)

DOUBLE = {"in_channels": 16, **SMALL, "num_single_layers": 2, "joint_attention_dim": TEXT, **AXES}
PATCHES = {**LATENT, "patch_size": 2, "sample_size": 8}


def ids(axes: int = 3) -> dict[str, Any]:
    image = torch.arange(9 * axes).reshape(9, axes) % 3
    return {"img_ids": image.float(), "txt_ids": torch.zeros(TOKENS, axes)}


def packed(**more: Any) -> dict[str, Any]:
    """A call with image tokens and their positions, as FLUX has it."""
    return call(9, 16, time=FRACTIONS, **ids(), **more)


def sizes(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, torch.full((2, 2), 64))


def hunyuan_dit() -> dict[str, Any]:
    masks = {"text_embedding_mask": torch.ones(2, 5), "text_embedding_mask_t5": torch.ones(2, 6)}
    rope = get_2d_rotary_pos_embed(32, ((0, 0), (4, 4)), (4, 4), output_type="pt")
    more = {"encoder_hidden_states_t5": random(2, 6, 32), "image_rotary_emb": rope, **masks}
    return call(4, 8, 8, time=1000 * FRACTIONS, **more)


def hidream() -> dict[str, Any]:
    return {
        "hidden_states": random(2, 4, 8, 8),
        "timesteps": torch.tensor([300, 700]),
        "encoder_hidden_states_t5": random(2, TOKENS, TEXT),
        "encoder_hidden_states_llama3": random(2, 2, TOKENS, TEXT),
        "pooled_embeds": random(2, 16),
    }


COGVIEW = {**PATCHES, **SMALL, "text_embed_dim": TEXT, "time_embed_dim": 32, "condition_dim": 16}
IMAGES = {
    "AuraFlowTransformer2DModel": Row(
        {
            **PATCHES,
            **HEADS,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "joint_attention_dim": TEXT,
            "caption_projection_dim": WIDTH,
            "pos_embed_max_size": 16,
        },
        lambda: call(4, 8, 8, time=FRACTIONS),
    ),
    "BriaTransformer2DModel": Row(DOUBLE, packed),
    "BriaFiboTransformer2DModel": Row(
        {**DOUBLE, "text_encoder_dim": 32},
        lambda: packed(text_encoder_layers=[random(2, TOKENS, 32)] * 4),
    ),
    "BriaFibo2Transformer2DModel": Row(
        {
            "in_channels": 4,
            "dim": 64,
            "n_layers": 4,
            "n_heads": 2,
            "n_refiner_layers": 1,
            "cap_feat_dim": TEXT,
            "injection_layer_ids": (1, 3),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": ROPE,
            "axes_lens": (64, 64, 64),
        },
        lambda: (
            call(4, 8, 8, time=FRACTIONS, encoder_attention_mask=flag(5, 3))
            | {"encoder_hidden_states": random(2, 5, TOKENS, TEXT)}
        ),
    ),
    "ChromaTransformer2DModel": Row(
        {
            **DOUBLE,
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 64,
            "approximator_layers": 1,
        },
        packed,
    ),
    "CogView3PlusTransformer2DModel": Row(
        {**COGVIEW, "pos_embed_max_size": 8},
        lambda: call(4, 8, 8, **sizes("original_size", "target_size", "crop_coords")),
    ),
    "CogView4Transformer2DModel": Row(
        {**COGVIEW, "pos_embed_max_size": 8, "rope_axes_dim": (16, 16)},
        lambda: call(4, 8, 8, **sizes("original_size", "target_size", "crop_coords")),
    ),
    "DiTTransformer2DModel": Row(
        {**SMALL, **PATCHES, "num_embeds_ada_norm": 1000},
        lambda: {
            "hidden_states": random(2, 4, 8, 8),
            "timestep": torch.tensor([300, 700]),
            "class_labels": torch.tensor([1, 2]),
        },
    ),
    "DreamLiteTransformer2DModel": Row(
        {**SMALL, "in_channels": 64, "cross_attention_dim": TEXT},
        lambda: (
            {"hidden_states": random(2, 64, 4, 4)}
            | {"encoder_hidden_states": random(2, TOKENS, TEXT)}
        ),
        {"in_channels": 320, "cross_attention_dim": 2048},
    ),
    "ErnieImageTransformer2DModel": Row(
        {
            **LATENT,
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 128,
            "text_in_dim": TEXT,
            "rope_axes_dim": ROPE,
        },
        lambda: {
            "hidden_states": random(2, 4, 8, 8),
            "timestep": torch.tensor([300, 700]),
            "text_bth": random(2, TOKENS, TEXT),
            "text_lens": torch.tensor([5, 3]),
        },
    ),
    "Flux3Transformer2DModel": Row(
        {**DOUBLE, "cond_in_channels": 16, "axes_dims_rope": (8, 8, 8, 8), "timestep_channels": 32},
        lambda: (
            call(9, 16, time=FRACTIONS, image_cond_hidden_states=random(2, 9, 16))
            | ids(4)
            | {"image_cond_ids": torch.ones(9, 4)}
        ),
    ),
    "GlmImageTransformer2DModel": Row(
        {
            **LATENT,
            **SMALL,
            "text_embed_dim": TEXT,
            "time_embed_dim": 32,
            "condition_dim": 16,
            "prior_vq_quantizer_codebook_size": 32,
        },
        lambda: (
            call(4, 8, 8, **sizes("target_size", "crop_coords"))
            | {"prior_token_id": torch.arange(16).expand(2, 16)}
            | {"prior_token_drop": torch.zeros(2, 16, dtype=torch.bool)}
        ),
    ),
    "HiDreamImageTransformer2DModel": Row(
        {
            **LATENT,
            **HEADS,
            "num_layers": 1,
            "num_single_layers": 1,
            "patch_size": 2,
            "max_resolution": (8, 8),
            "num_routed_experts": 4,
            "num_activated_experts": 2,
            "llama_layers": [0, 1],
            "caption_channels": [TEXT, TEXT],
            "text_emb_dim": 16,
            "axes_dims_rope": (16, 8, 8),
        },
        hidream,
        {
            "patch_size": 2,
            "caption_channels": [4096, 4096],
            "llama_layers": [*range(48)],
            "axes_dims_rope": (64, 32, 32),
        },
    ),
    "HunyuanDiT2DModel": Row(
        {
            **HEADS,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": WIDTH,
            "num_layers": 4,
            "in_channels": 4,
            "mlp_ratio": 2.0,
            "activation_fn": "gelu-approximate",
            "cross_attention_dim": TEXT,
            "cross_attention_dim_t5": 32,
            "text_len": TOKENS,
            "text_len_t5": 6,
            "pooled_projection_dim": POOLED,
            "use_style_cond_and_image_meta_size": False,
        },
        hunyuan_dit,
        {"in_channels": 4, "patch_size": 2},
    ),
    "HunyuanImageTransformer2DModel": Row(
        {
            **LATENT,
            **SMALL,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": TEXT,
            "text_embed_2_dim": 32,
            "rope_axes_dim": (16, 16),
        },
        lambda: (
            call(4, 8, 8, time=1000 * FRACTIONS, encoder_attention_mask=mask(5, 3))
            | {"encoder_hidden_states_2": random(2, TOKENS, 32)}
            | {"encoder_attention_mask_2": mask(4, 2)}
        ),
    ),
    "LongCatImageTransformer2DModel": Row({**DOUBLE, "pooled_projection_dim": POOLED}, packed),
    "Lumina2Transformer2DModel": Row(
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 96,
            "cap_feat_dim": TEXT,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "multiple_of": 32,
            "axes_dim_rope": ROPE,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "axes_lens": (64, 64, 64),
        },
        lambda: call(4, 8, 8, time=FRACTIONS, encoder_attention_mask=flag(5, 3)),
    ),
    "LuminaNextDiT2DModel": Row(
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 64,
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 2,
            "multiple_of": 32,
            "cross_attention_dim": TEXT,
        },
        lambda: (
            call(4, 8, 8, time=FRACTIONS, encoder_mask=flag(5, 3), cross_attention_kwargs={})
            | {"image_rotary_emb": torch.polar(torch.ones(8, 8, 16), random(8, 8, 16))}
        ),
        {"num_kv_heads": 8},
    ),
    "NucleusMoEImageTransformer2DModel": Row(
        {
            **HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 5,
            "joint_attention_dim": TEXT,
            **AXES,
            "num_experts": 8,
            "moe_intermediate_dim": 128,
            "capacity_factors": 2.0,
        },
        lambda: (
            call(9, 16, time=FRACTIONS, encoder_hidden_states_mask=flag(5, 3))
            | {"img_shapes": [(1, 3, 3)] * 2}
        ),
    ),
    "OmniGenTransformer2DModel": Row(
        {
            "in_channels": 4,
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 100,
            "time_step_dim": 32,
            "pos_embed_max_size": 8,
            "rope_scaling": {"long_factor": [1.0] * 16, "short_factor": [1.0] * 16},
        },
        lambda: {
            "hidden_states": random(2, 4, 8, 8),
            "timestep": FRACTIONS,
            "input_ids": torch.arange(10).reshape(2, 5),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(2, 22, 22),
            "position_ids": torch.arange(22).expand(2, 22),
        },
        {"rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48}},
    ),
    "OvisImageTransformer2DModel": Row({**DOUBLE, "out_channels": 16}, packed),
    "PRXTransformer2DModel": Row(
        {
            "in_channels": 4,
            "context_in_dim": TEXT,
            "hidden_size": 64,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [16, 16],
        },
        lambda: call(4, 8, 8, time=FRACTIONS, attention_mask=flag(5, 3)),
    ),
    "PriorTransformer": Row(
        {**SMALL, "embedding_dim": 32, "num_embeddings": TOKENS},
        lambda: {
            "hidden_states": random(2, 32),
            "timestep": torch.tensor([300, 700]),
            "proj_embedding": random(2, 32),
            "encoder_hidden_states": random(2, TOKENS, 32),
            "attention_mask": flag(5, 3),
        },
    ),
    "Transformer2DModel": Row(
        {**SMALL, "in_channels": 32, "cross_attention_dim": TEXT},
        lambda: (
            {"hidden_states": random(2, 32, 4, 4)}
            | {"encoder_hidden_states": random(2, TOKENS, TEXT)}
        ),
        {"in_channels": 320, "cross_attention_dim": 768, "norm_type": "layer_norm"},
    ),
}
