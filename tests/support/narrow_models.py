"""Models of benchmarks/full_size.py made narrow: one or two blocks, which read a few words."""

import functools
from typing import Any

from dirotq.benchmarks import contestants, full_size, model_inputs
from dirotq.benchmarks.model_inputs import Case
from dirotq.benchmarks.whole_images import Sizes

NARROW = {
    "flux": {
        "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 32,
        "num_attention_heads": 4, "joint_attention_dim": 64, "pooled_projection_dim": 64,
        "axes_dims_rope": (8, 12, 12), "in_channels": 16, "guidance_embeds": True,
    },
    "pixart_sigma": {
        "num_layers": 1, "num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 4,
        "out_channels": 8, "cross_attention_dim": 128, "caption_channels": 64, "sample_size": 8,
        "patch_size": 2, "interpolation_scale": 2, "use_additional_conditions": False,
    },
    "sana": {
        "num_layers": 1, "num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 4,
        "out_channels": 4, "num_cross_attention_heads": 4, "cross_attention_head_dim": 32,
        "cross_attention_dim": 128, "caption_channels": 64, "sample_size": 8, "patch_size": 1,
    },
    "sd3": {
        "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 32, "sample_size": 8,
        "in_channels": 4, "out_channels": 4, "joint_attention_dim": 64,
        "caption_projection_dim": 128, "pooled_projection_dim": 64, "pos_embed_max_size": 16,
        "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    },
    "z_image": {
        "in_channels": 4, "dim": 192, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 6,
        "n_kv_heads": 6, "cap_feat_dim": 64, "axes_dims": [8, 12, 12], "axes_lens": [1024, 64, 64],
    },
    "flux2_klein": {
        "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 4,
        "attention_head_dim": 32, "in_channels": 16, "joint_attention_dim": 64,
        "timestep_guidance_channels": 32, "axes_dims_rope": (8, 8, 8, 8), "guidance_embeds": False,
    },
    "qwen_image": {
        "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 16,
        "out_channels": 4, "joint_attention_dim": 64, "axes_dims_rope": (8, 12, 12),
    },
    "wan": {
        "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 4,
        "out_channels": 4, "text_dim": 64, "freq_dim": 32, "ffn_dim": 256,
    },
}  # fmt: skip
SIZES = {model: Case(model, 64) for model in NARROW} | {"pixart_sigma": Case("pixart_sigma", 64, 2)}
SMALL = Sizes(
    clip={"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
          "num_attention_heads": 2},
    t5={"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4},
    qwen={"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
    autoencoder={"block_out_channels": (8,) * 4, "layers_per_block": 1, "latent_channels": 4,
                 "norm_num_groups": 4},
)  # fmt: skip
"""Text encoders and autoencoder beside them."""
METHOD = functools.cache(contestants.method)


def narrowed(monkeypatch: Any) -> None:
    """Put the narrow models in the place of the full-size ones."""
    monkeypatch.setattr(contestants, "method", METHOD)
    monkeypatch.setattr(model_inputs, "TEXT", dict.fromkeys(NARROW, 8))
    monkeypatch.setattr(model_inputs, "FRAMES", 5)
    for model, config in NARROW.items():
        cls = full_size.ARCHITECTURES[model][0]
        monkeypatch.setitem(full_size.ARCHITECTURES, model, (cls, config))
