"""HunyuanVideo: a refiner of the text, then double-stream and single-stream blocks."""

from .family import ModelFamily, SiteRule

REFINER = "context_embedder.token_refiner.refiner_blocks.*"
DOUBLE, SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")

HUNYUAN_VIDEO = ModelFamily(
    name="hunyuan_video",
    transformer="HunyuanVideoTransformer3DModel",
    rules=(
        SiteRule(REFINER, ("norm_out.linear",), kind="modulator"),
        SiteRule(f"{REFINER}.attn", ("to_q", "to_k", "to_v"), "qkv", text=True),
        SiteRule(f"{REFINER}.attn", ("to_out.0",), text=True),
        SiteRule(f"{REFINER}.ff", ("net.0.proj",), text=True),
        SiteRule(f"{REFINER}.ff", ("net.2",), text=True),
        SiteRule(DOUBLE, ("norm1.linear",), kind="modulator"),
        SiteRule(DOUBLE, ("norm1_context.linear",), kind="modulator"),
        SiteRule(f"{DOUBLE}.attn", ("to_q", "to_k", "to_v"), "qkv"),
        SiteRule(f"{DOUBLE}.attn", ADDED, "add_qkv", text=True),
        SiteRule(f"{DOUBLE}.attn", ("to_out.0",)),
        SiteRule(f"{DOUBLE}.attn", ("to_add_out",), text=True),
        SiteRule(f"{DOUBLE}.ff", ("net.0.proj",)),
        SiteRule(f"{DOUBLE}.ff", ("net.2",)),
        SiteRule(f"{DOUBLE}.ff_context", ("net.0.proj",), text=True),
        SiteRule(f"{DOUBLE}.ff_context", ("net.2",), text=True),
        SiteRule(SINGLE, ("norm.linear",), kind="modulator"),
        # The attention makes a tensor of its own of what proj_mlp reads.
        SiteRule(f"{SINGLE}.attn", ("to_q", "to_k", "to_v"), "qkv"),
        SiteRule(SINGLE, ("proj_mlp",)),
        SiteRule(SINGLE, ("proj_out",)),
    ),
    keep=(
        "context_embedder.proj_in",
        "context_embedder.time_text_embed.*.linear_1",
        "context_embedder.time_text_embed.*.linear_2",
        "time_text_embed.*.linear_1",
        "time_text_embed.*.linear_2",
        "norm_out.linear",
        "proj_out",
    ),
    call={
        "num_inference_steps": 50,
        "guidance_scale": 6.0,
        "height": 720,
        "width": 1280,
        "num_frames": 129,
        "max_sequence_length": 256,
    },
    mask="encoder_attention_mask",
)
