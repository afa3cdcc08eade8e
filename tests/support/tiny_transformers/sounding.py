"""Transformers that make clips with sound."""

import torch

from .row import HEADS, LATENT, POOLED, ROPE, TEXT, TOKENS, WIDTH, Row, call, flag, mask, random
from .videos import CROSS

AUDIO = {
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 32,
}
SOUNDING = {
    "Kandinsky6Transformer3DModel": Row(
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
            "visual_cond": False,
            "in_audio_dim": 6,
            "out_audio_dim": 6,
        },
        lambda: (
            call(2, 8, 8, 4, encoder_attention_mask=flag(5, 3))
            | {"pooled_projections": random(2, POOLED), "audio_hidden_states": random(2, 7, 6)}
        ),
    ),
    "MiniMaxH3Transformer3DModel": Row(
        {
            **HEADS,
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 128,
            "in_channels": 4,
            "audio_in_channels": 6,
            "text_dim": TEXT,
            "freq_dim": 32,
            "time_embed_hidden_dim": 32,
            "time_embed_dim": 32,
            "rope_freq_dim": 4,
        },
        lambda: {
            "hidden_states": random(1, 9, 16),
            "audio_hidden_states": random(1, 4, 6),
            "encoder_hidden_states": random(1, TOKENS, TEXT),
            "timestep": torch.tensor([0.3, 0.8]),
            "timestep_indices": torch.tensor([0] * 10 + [1] * 8),
            "token_tags": torch.tensor([1] * 5 + [0] * 9 + [2] * 4),
            "position_ids": torch.arange(54).reshape(18, 3) % 5,
            "text_indices": torch.arange(5),
            "video_indices": torch.arange(5, 14),
            "audio_indices": torch.arange(14, 18),
        },
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Row(
        {**LATENT, **CROSS, **AUDIO},
        lambda: (
            call(12, 4, encoder_attention_mask=mask(5, 3))
            | {"video_rotary_emb": (random(2, 12, 64), random(2, 12, 64))}
        ),
    ),
}
