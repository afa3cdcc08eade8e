"""Transformers that make sound, proteins and parts of other models."""

from typing import Any

import torch

from .row import FRACTIONS, SMALL, TEXT, TOKENS, WIDTH, Row, call, flag, mask, random


def cosmos3() -> dict[str, Any]:
    return {
        "input_ids": torch.arange(TOKENS),
        "text_indexes": torch.arange(TOKENS),
        "position_ids": torch.arange(13).expand(3, 13),
        "und_len": TOKENS,
        "sequence_length": 13,
        "vision_tokens": [random(1, 4, 2, 4, 4)],
        "vision_token_shapes": [(2, 2, 2)],
        "vision_sequence_indexes": torch.arange(TOKENS, 13),
        "vision_mse_loss_indexes": torch.arange(TOKENS, 13),
        "vision_timesteps": torch.full((8,), 300.0),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }


def protein() -> dict[str, Any]:
    return {
        "bb_ca": random(2, 6, 3),
        "local_latents": random(2, 6, 8),
        "bb_ca_time": FRACTIONS,
        "local_latents_time": FRACTIONS,
        "padding_mask": torch.ones(2, 6, dtype=torch.bool),
        "conditioning": {
            "is_in_context_conditioning": torch.zeros(2, 6, dtype=torch.bool),
            "supports_local_latent": torch.ones(2, 6, dtype=torch.bool),
        },
    }


OTHERS = {
    "AceStepTransformer1DModel": Row(
        {
            "hidden_size": WIDTH,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "sliding_window": 4,
            "encoder_hidden_size": TEXT,
        },
        lambda: call(8, 4, time=FRACTIONS, timestep_r=FRACTIONS, context_latents=random(2, 8, 8)),
    ),
    "Cosmos3OmniTransformer": Row(
        {
            "head_dim": 32,
            "hidden_size": WIDTH,
            "intermediate_size": 128,
            "latent_channel": 4,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "patch_latent_dim": 16,
            "vocab_size": 100,
            "rope_scaling": {"mrope_section": [6, 5, 5]},
        },
        cosmos3,
    ),
    "LongCatAudioDiTTransformer": Row(
        {"dit_dim": WIDTH, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": TEXT, "latent_dim": 4},
        lambda: (
            call(9, 4, time=FRACTIONS, encoder_attention_mask=flag(5, 3))
            | {"latent_cond": random(2, 9, 4), "attention_mask": torch.ones(2, 9, dtype=torch.bool)}
        ),
    ),
    "MiniMaxMusic3RVQDepthDecoder": Row(
        {
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "audio_vocab_size": 32,
            "num_codebooks": 3,
        },
        lambda: {"inputs_embeds": random(2, 4, WIDTH)},
    ),
    "MiniMaxMusic3Transformer1DModel": Row(
        {
            "in_channels": 4,
            "condition_dim": TEXT,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "ff_inner_dim": 128,
            "rotary_dim": 16,
            "fourier_embedding_dim": 32,
        },
        lambda: call(4, 9, time=FRACTIONS) | {"encoder_hidden_states": random(2, 9, TEXT)},
    ),
    "RFD4ProteinaTransformer": Row(
        {
            "nlayers": 2,
            "token_dim": WIDTH,
            "nheads": 2,
            "dim_cond": 32,
            "pair_repr_dim": 32,
            "latent_dim": 8,
            "t_emb_dim": 32,
            "tri_mult_c": 32,
            "feats_seq": ("xt_bb_ca", "xt_local_latents"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists", "bond_mask"),
        },
        protein,
    ),
    "StableAudioDiTModel": Row(
        {
            **SMALL,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": 32,
            "time_proj_dim": 32,
            "global_states_input_dim": 24,
            "cross_attention_input_dim": TEXT,
        },
        lambda: (
            call(4, 16, time=FRACTIONS)
            | {"global_hidden_states": random(2, 1, 24)}
            | {"rotary_embedding": (random(17, 16), random(17, 16))}
        ),
    ),
    "StableAudio3DiTModel": Row(
        {
            "io_channels": 4,
            "embed_dim": WIDTH,
            "depth": 2,
            "num_heads": 2,
            "cond_token_dim": TEXT,
            "global_cond_dim": 24,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 32,
            "num_memory_tokens": 3,
        },
        lambda: (
            call(4, 16, time=FRACTIONS)
            | {"global_hidden_states": random(2, 24), "local_add_cond": random(2, 5, 16)}
        ),
    ),
    "T5FilmDecoder": Row(
        {
            "input_dims": 8,
            "targets_length": 6,
            "d_model": WIDTH,
            "num_layers": 2,
            "num_heads": 2,
            "d_kv": 32,
            "d_ff": 128,
        },
        lambda: {
            "encodings_and_masks": [(random(2, TOKENS, WIDTH), mask(5, 3))],
            "decoder_input_tokens": random(2, 6, 8),
            "decoder_noise_time": FRACTIONS,
        },
    ),
    "TransformerTemporalModel": Row(
        {**SMALL, "in_channels": 64},
        lambda: {"hidden_states": random(4, 64, 4, 4), "num_frames": 2},
        {"in_channels": 320},
    ),
}
