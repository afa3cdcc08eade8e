"""Qwen-Image (and its edit models): 60 double-stream blocks."""

from .family import ModelFamily, SiteRule

BLOCK = "transformer_blocks.*"
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")

QWEN_IMAGE = ModelFamily(
    name="qwen_image",
    transformer="QwenImageTransformer2DModel",
    rules=(
        SiteRule(f"{BLOCK}", ("img_mod.1",), kind="modulator"),
        SiteRule(f"{BLOCK}", ("txt_mod.1",), kind="modulator"),
        SiteRule(f"{BLOCK}.attn", ("to_q", "to_k", "to_v"), "qkv"),
        SiteRule(f"{BLOCK}.attn", ADDED, "add_qkv", text=True),
        SiteRule(f"{BLOCK}.attn", ("to_out.0",)),
        SiteRule(f"{BLOCK}.attn", ("to_add_out",), text=True),
        SiteRule(f"{BLOCK}.img_mlp", ("net.0.proj",)),
        SiteRule(f"{BLOCK}.img_mlp", ("net.2",)),
        SiteRule(f"{BLOCK}.txt_mlp", ("net.0.proj",), text=True),
        SiteRule(f"{BLOCK}.txt_mlp", ("net.2",), text=True),
    ),
    keep=(
        "img_in",
        "txt_in",
        "time_text_embed.*.linear_1",
        "time_text_embed.*.linear_2",
        "norm_out.linear",
        "proj_out",
    ),
    call={
        "num_inference_steps": 50,
        "true_cfg_scale": 4.0,
        # Without one the pipeline leaves guidance out; its model card has a space.
        "negative_prompt": " ",
        "height": 1328,
        "width": 1328,
        "max_sequence_length": 512,
    },
    mask="encoder_hidden_states_mask",
)
