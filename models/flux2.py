"""FLUX.2 (dev, klein and finetunes): all blocks of a kind share their modulation."""

from .family import ModelFamily, SiteRule

DOUBLE, SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")

FLUX2 = ModelFamily(
    name="flux2",
    transformer="Flux2Transformer2DModel",
    rules=(
        SiteRule("double_stream_modulation_img", ("linear",), kind="modulator"),
        SiteRule("double_stream_modulation_txt", ("linear",), kind="modulator"),
        SiteRule("single_stream_modulation", ("linear",), kind="modulator"),
        SiteRule(f"{DOUBLE}.attn", ("to_q", "to_k", "to_v"), "qkv"),
        SiteRule(f"{DOUBLE}.attn", ADDED, "add_qkv", text=True),
        SiteRule(f"{DOUBLE}.attn", ("to_out.0",)),
        SiteRule(f"{DOUBLE}.attn", ("to_add_out",), text=True),
        SiteRule(f"{DOUBLE}.ff", ("linear_in",)),
        SiteRule(f"{DOUBLE}.ff", ("linear_out",)),
        SiteRule(f"{DOUBLE}.ff_context", ("linear_in",), text=True),
        SiteRule(f"{DOUBLE}.ff_context", ("linear_out",), text=True),
        # q, k, v and both halves of the gated MLP are one linear already.
        SiteRule(f"{SINGLE}.attn", ("to_qkv_mlp_proj",)),
        SiteRule(f"{SINGLE}.attn", ("to_out",)),
    ),
    keep=(
        "x_embedder",
        "context_embedder",
        "time_guidance_embed.*.linear_1",
        "time_guidance_embed.*.linear_2",
        "norm_out.linear",
        "proj_out",
    ),
    call={
        "num_inference_steps": 50,
        "guidance_scale": 4.0,
        "height": 1024,
        "width": 1024,
        "max_sequence_length": 512,
    },
)
