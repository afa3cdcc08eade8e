"""Qwen-Image 2.1: 32 blocks of one stream, text and pictures before the image."""

from .family import ModelFamily, SiteRule

BLOCK = "transformer_blocks.*"

QWEN_IMAGE21 = ModelFamily(
    name="qwen_image21",
    transformer="QwenImage21Transformer2DModel",
    rules=(
        # One modulation for all blocks.
        SiteRule("modulation", ("1",), kind="modulator"),
        SiteRule(f"{BLOCK}.attn", ("to_q", "to_k", "to_v"), "qkv"),
        SiteRule(f"{BLOCK}.attn", ("to_out.0",)),
        SiteRule(f"{BLOCK}.img_mlp", ("proj", "gate_layer"), "proj_gate"),
        SiteRule(f"{BLOCK}.img_mlp", ("out",)),
    ),
    keep=(
        "img_in",
        "txt_in.in_layer",
        "txt_in.out_layer",
        "time_text_embed.*.linear_1",
        "time_text_embed.*.linear_2",
        "norm_out.linear",
        "proj_out",
    ),
    call={
        "num_inference_steps": 40,
        "true_cfg_scale": 1.0,
        "height": 1024,
        "width": 1024,
        # A call that reads keys and values of an earlier one can't be recorded on its own.
        "use_kv_cache": False,
    },
)
