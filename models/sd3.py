"""Stable Diffusion 3 and 3.5 (medium, large, turbo): double-stream blocks.

Some blocks of 3.5 medium attend to the image a second time (``attn2``); the last block's text
stream ends at its attention, so it has no ``to_add_out`` and no ``ff_context``.
"""

from .family import ModelFamily, SiteRule

BLOCK = "transformer_blocks.*"
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")

SD3 = ModelFamily(
    name="sd3",
    transformer="SD3Transformer2DModel",
    rules=(
        SiteRule(f"{BLOCK}", ("norm1.linear",), kind="modulator"),
        SiteRule(f"{BLOCK}", ("norm1_context.linear",), kind="modulator"),
        SiteRule(f"{BLOCK}.attn", ("to_q", "to_k", "to_v"), "qkv"),
        SiteRule(f"{BLOCK}.attn", ADDED, "add_qkv", text=True),
        SiteRule(f"{BLOCK}.attn", ("to_out.0",)),
        SiteRule(f"{BLOCK}.attn", ("to_add_out",), text=True),
        SiteRule(f"{BLOCK}.attn2", ("to_q", "to_k", "to_v"), "qkv"),
        SiteRule(f"{BLOCK}.attn2", ("to_out.0",)),
        SiteRule(f"{BLOCK}.ff", ("net.0.proj",)),
        SiteRule(f"{BLOCK}.ff", ("net.2",)),
        SiteRule(f"{BLOCK}.ff_context", ("net.0.proj",), text=True),
        SiteRule(f"{BLOCK}.ff_context", ("net.2",), text=True),
    ),
    keep=(
        "context_embedder",
        "time_text_embed.*.linear_1",
        "time_text_embed.*.linear_2",
        "norm_out.linear",
        "proj_out",
    ),
    call={
        "num_inference_steps": 28,
        "guidance_scale": 7.0,
        "height": 1024,
        "width": 1024,
        "max_sequence_length": 256,
    },
)
