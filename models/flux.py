"""FLUX.1 (dev, schnell, Fill, Kontext, finetunes): 19 double-stream, 38 single-stream blocks."""

from .family import ModelFamily, SiteRule

DOUBLE, SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")

FLUX = ModelFamily(
    name="flux",
    transformer="FluxTransformer2DModel",
    rules=(
        SiteRule(f"{DOUBLE}", ("norm1.linear",), kind="modulator"),
        SiteRule(f"{DOUBLE}", ("norm1_context.linear",), kind="modulator"),
        SiteRule(f"{DOUBLE}.attn", ("to_q", "to_k", "to_v"), "qkv"),
        SiteRule(f"{DOUBLE}.attn", ADDED, "add_qkv", text=True),
        SiteRule(f"{DOUBLE}.attn", ("to_out.0",)),
        SiteRule(f"{DOUBLE}.attn", ("to_add_out",), text=True),
        SiteRule(f"{DOUBLE}.ff", ("net.0.proj",)),
        SiteRule(f"{DOUBLE}.ff", ("net.2",)),
        SiteRule(f"{DOUBLE}.ff_context", ("net.0.proj",), text=True),
        SiteRule(f"{DOUBLE}.ff_context", ("net.2",), text=True),
        SiteRule(f"{SINGLE}", ("norm.linear",), kind="modulator"),
        SiteRule(f"{SINGLE}", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), name="qkv_mlp"),
        SiteRule(f"{SINGLE}", ("proj_out",)),
    ),
    keep=(
        "x_embedder",
        "context_embedder",
        "time_text_embed.*.linear_1",
        "time_text_embed.*.linear_2",
        "norm_out.linear",
        "proj_out",
    ),
    call={
        "num_inference_steps": 28,
        "guidance_scale": 3.5,
        "height": 1024,
        "width": 1024,
        "max_sequence_length": 512,
    },
)
