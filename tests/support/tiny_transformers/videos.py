"""Transformers that make clips, most of them with the size (channels, frames, height, width)."""

from typing import Any

import torch

from .row import (
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

CLIP = (4, 2, 8, 8)
WAN = {**LATENT, **SMALL, "text_dim": TEXT, "freq_dim": 32, "ffn_dim": 128}
HUNYUAN = {**LATENT, **SMALL, "num_refiner_layers": 1, "text_embed_dim": TEXT}
HUNYUAN |= {"rope_axes_dim": ROPE}
DUAL = {**HUNYUAN, "num_single_layers": 2, "pooled_projection_dim": POOLED}
COGVIDEO = {**LATENT, **SMALL, "time_embed_dim": 32, "text_embed_dim": TEXT}
COGVIDEO |= {"sample_width": 8, "sample_height": 8, "sample_frames": 5}
COGVIDEO |= {"max_text_seq_length": TOKENS}
CROSS = {**HEADS, "cross_attention_dim": WIDTH, "num_layers": 2, "caption_channels": TEXT}
SANA = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 32}


def pooled(time: Any = 1000 * FRACTIONS, **more: Any) -> dict[str, Any]:
    extra = {"pooled_projections": random(2, POOLED), "encoder_attention_mask": mask(5, 3)}
    return call(*CLIP, time=time, **extra, **more)


def two_times() -> dict[str, Any]:
    return call(2, 4, 8, 8, time=torch.full((2, 2), 700), r_timestep=torch.full((2, 2), 300))


def wan_animate_2() -> dict[str, Any]:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [random(4, 2, 8, 8)],
        "timestep": torch.tensor([300]),
        "encoder_hidden_states": [random(TOKENS, TEXT)],
        "condition_latents": [random(4, 2, 8, 8)],
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": 32,
        "offset_grid_sizes": torch.tensor([[2, 4, 4]]),
    }


VIDEOS = {
    "AllegroTransformer3DModel": Row(
        {**LATENT, **CROSS, "sample_height": 8, "sample_width": 8, "sample_frames": 2},
        lambda: call(
            *CLIP, encoder_attention_mask=mask(5, 3), attention_mask=torch.ones(2, 2, 8, 8)
        ),
    ),
    "AnyFlowTransformer3DModel": Row(WAN, two_times),
    "AnyFlowFARTransformer3DModel": Row(
        {**WAN, "full_chunk_limit": 1, "chunk_partition": (1, 1)},
        lambda: two_times() | {"chunk_partition": [1, 1]},
    ),
    "ChronoEditTransformer3DModel": Row({**WAN, "rope_temporal_skip_len": 2}, lambda: call(*CLIP)),
    "CogVideoXTransformer3DModel": Row(COGVIDEO, lambda: call(2, 4, 8, 8)),
    "ConsisIDTransformer3DModel": Row(
        {
            **COGVIDEO,
            "is_train_face": True,
            "cross_attn_interval": 1,
            "cross_attn_dim_head": 16,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 24,
            "LFE_vit_dim": 16,
            "LFE_depth": 5,
            "LFE_dim_head": 16,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 4,
            "LFE_num_scale": 5,
            "LFE_output_dim": 42,
            "LFE_ff_mult": 2,
        },
        lambda: call(
            2, 4, 8, 8, id_cond=random(2, 24), id_vit_hidden=[random(2, 6, 16) for _ in range(5)]
        ),
    ),
    "CosmosTransformer3DModel": Row(
        {
            **LATENT,
            **SMALL,
            "text_embed_dim": TEXT,
            "adaln_lora_dim": 16,
            "max_size": (4, 16, 16),
            "concat_padding_mask": False,  # it wants torchvision
            "extra_pos_embed_type": None,
        },
        lambda: call(*CLIP, time=FRACTIONS),
    ),
    "EasyAnimateTransformer3DModel": Row(
        {
            **LATENT,
            **HEADS,
            "num_layers": 2,
            "mmdit_layers": 2,
            "patch_size": 2,
            "time_embed_dim": 32,
            "text_embed_dim": TEXT,
        },
        lambda: call(*CLIP, time=FRACTIONS),
        {**LATENT, "patch_size": 2},
    ),
    "HeliosTransformer3DModel": Row(
        {**WAN, "rope_dim": ROPE},
        lambda: (
            call(*CLIP)
            | {"indices_hidden_states": torch.tensor([[3, 4]] * 2)}
            | {"indices_latents_history_short": torch.tensor([[2]] * 2)}
            | {"indices_latents_history_mid": torch.tensor([[0, 1]] * 2)}
            | {"indices_latents_history_long": torch.tensor([[0, 1, 2, 3]] * 2)}
            | {"latents_history_short": random(2, 4, 1, 8, 8)}
            | {"latents_history_mid": random(2, 4, 2, 8, 8)}
            | {"latents_history_long": random(2, 4, 4, 8, 8)}
        ),
    ),
    "HunyuanVideoFramepackTransformer3DModel": Row(
        {**DUAL, "has_image_proj": True, "image_proj_dim": 32, "has_clean_x_embedder": True},
        lambda: (
            pooled(guidance=1000 * FRACTIONS)
            | {"image_embeds": random(2, 3, 32)}
            | {"indices_latents": torch.tensor([5, 6])}
            | {"latents_clean": random(2, 4, 2, 8, 8)}
            | {"indices_latents_clean": torch.tensor([0, 1])}
            | {"latents_history_2x": random(2, 4, 2, 8, 8)}
            | {"indices_latents_history_2x": torch.tensor([0, 1])}
            | {"latents_history_4x": random(2, 4, 4, 8, 8)}
            | {"indices_latents_history_4x": torch.tensor([0, 1, 2, 3])}
        ),
    ),
    "HunyuanVideo15Transformer3DModel": Row(
        {**HUNYUAN, "text_embed_2_dim": 32, "image_embed_dim": 24, "target_size": 16},
        lambda: (
            call(*CLIP, time=1000 * FRACTIONS, encoder_attention_mask=flag(5, 3))
            | {"encoder_hidden_states_2": random(2, TOKENS, 32)}
            | {"encoder_attention_mask_2": flag(4, 2)}
            | {"image_embeds": random(2, 3, 24)}
        ),
    ),
    "JoyImageEditTransformer3DModel": Row(
        {
            "in_channels": 4,
            "hidden_size": WIDTH,
            "num_attention_heads": 2,
            "num_layers": 2,
            "text_dim": TEXT,
            "rope_dim_list": list(ROPE),
        },
        lambda: call(*CLIP),
    ),
    "JoyImageEditPlusTransformer3DModel": Row(
        {
            "in_channels": 4,
            "hidden_size": WIDTH,
            "num_attention_heads": 2,
            "num_layers": 2,
            "text_dim": TEXT,
            "rope_dim_list": list(ROPE),
        },
        lambda: (
            call(32, 4, 1, 2, 2, encoder_hidden_states_mask=mask(5, 3))
            | {"shape_list": [[(1, 4, 4), (1, 4, 4)], [(1, 4, 4)]]}
        ),
    ),
    "Kandinsky5Transformer3DModel": Row(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": TEXT,
            "in_text_dim2": POOLED,
            "time_dim": 32,
            "model_dim": WIDTH,
            "ff_dim": 128,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": ROPE,
        },
        lambda: {
            "hidden_states": random(1, 2, 8, 8, 4),
            "encoder_hidden_states": random(1, TOKENS, TEXT),
            "timestep": torch.tensor([300]),
            "pooled_projections": random(1, POOLED),
            "visual_rope_pos": (torch.arange(2), torch.arange(4), torch.arange(4)),
            "text_rope_pos": torch.arange(TOKENS),
        },
    ),
    "Kandinsky6SRTransformer3DModel": Row(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 8,
            "time_dim": 32,
            "model_dim": WIDTH,
            "ff_dim": 128,
            "num_visual_blocks": 2,
            "axes_dims": ROPE,
            "nabla_window": (3, 3, 3),
        },
        lambda: {"hidden_states": random(1, 1, 16, 16, 9), "timestep": torch.tensor([300])},
    ),
    "LatteTransformer3DModel": Row(
        {
            **LATENT,
            **CROSS,
            "sample_size": 8,
            "patch_size": 2,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "num_embeds_ada_norm": 1000,
            "video_length": 2,
        },
        lambda: call(*CLIP),
        {
            **LATENT,
            "patch_size": 2,
            "num_layers": 28,
            "norm_type": "ada_norm_single",
            "cross_attention_dim": 1408,
            "caption_channels": 4096,
        },
    ),
    "LTXVideoTransformer3DModel": Row(
        {**LATENT, **CROSS},
        lambda: call(12, 4, encoder_attention_mask=mask(5, 3), num_frames=1, height=3, width=4),
    ),
    "MochiTransformer3DModel": Row(
        {
            **SMALL,
            "in_channels": 4,
            "pooled_projection_dim": POOLED,
            "text_embed_dim": TEXT,
            "time_embed_dim": 32,
        },
        lambda: call(*CLIP, encoder_attention_mask=flag(5, 3)),
    ),
    "MotifVideoTransformer3DModel": Row(
        {
            **LATENT,
            **SMALL,
            "num_single_layers": 2,
            "num_decoder_layers": 1,
            "text_embed_dim": TEXT,
            "rope_axes_dim": ROPE,
        },
        lambda: call(*CLIP, encoder_attention_mask=flag(5, 3)),
    ),
    "SanaVideoTransformer3DModel": Row(
        {**LATENT, **CROSS, **SANA, "sample_size": 8},
        lambda: call(*CLIP, encoder_attention_mask=mask(5, 3)),
    ),
    "SanaWMTransformer3DModel": Row(
        {
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": WIDTH,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 32,
            "chunk_plucker_channels": 6,
            "chunk_plucker_post_attn_blocks": 2,
            "caption_channels": TEXT,
        },
        lambda: {
            "hidden_states": random(1, 4, 2, 4, 4),
            "timestep": torch.full((1, 1, 2), 300),
            "encoder_hidden_states": random(1, 1, TOKENS, TEXT),
            "encoder_attention_mask": mask(4),
            "camera_conditions": random(1, 2, 20),
            "chunk_plucker": random(1, 6, 2, 4, 4),
        },
    ),
    "SkyReelsV2Transformer3DModel": Row(WAN, lambda: call(*CLIP)),
    "WanAnimateTransformer3DModel": Row(
        {
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 24,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 16,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 1,
        },
        lambda: (
            call(12, 3, 8, 8)
            | {"encoder_hidden_states_image": random(2, 257, 24)}
            | {"pose_hidden_states": random(2, 4, 2, 8, 8)}
            | {"face_pixel_values": random(2, 3, 5, 16, 16)}
        ),
    ),
    "WanAnimate2Transformer3DModel": Row(
        {
            "in_dim": 8,
            "dim": WIDTH,
            "ffn_dim": 128,
            "freq_dim": 32,
            "text_dim": TEXT,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 2,
            "text_len": 8,
            "use_img_emb": False,
        },
        wan_animate_2,
    ),
    "WanVACETransformer3DModel": Row(
        {**WAN, "vace_layers": [0], "vace_in_channels": 6},
        lambda: call(*CLIP, control_hidden_states=random(2, 6, 2, 8, 8)),
    ),
}
