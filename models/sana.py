"""SANA: linear self-attention, cross-attention to the text, and an MLP of convolutions."""

from .family import ModelFamily, SiteRule

BLOCK = "transformer_blocks.*"

SANA = ModelFamily(
    name="sana",
    transformer="SanaTransformer2DModel",
    rules=(
        # One modulation for all blocks; each adds a table of its own.
        SiteRule("time_embed", ("linear",), kind="modulator"),
        SiteRule(f"{BLOCK}.attn1", ("to_q", "to_k", "to_v"), "qkv"),
        SiteRule(f"{BLOCK}.attn1", ("to_out.0",)),
        SiteRule(f"{BLOCK}.attn2", ("to_q",)),
        # Of the text, which is short: next to no time, but 13% of the weights.
        SiteRule(f"{BLOCK}.attn2", ("to_k", "to_v"), "kv", kind="modulator", text=True),
        SiteRule(f"{BLOCK}.attn2", ("to_out.0",)),
        # The 3x3 convolution between them is depthwise: 0.2% of the weights.
        SiteRule(f"{BLOCK}.ff", ("conv_inverted",), "inverted"),
        SiteRule(f"{BLOCK}.ff", ("conv_point",), "point"),
    ),
    keep=(
        "patch_embed.proj",
        # SANA-Sprint embeds the guidance beside the time.
        "time_embed.*.linear_1",
        "time_embed.*.linear_2",
        "time_embed.emb.*.linear_1",
        "time_embed.emb.*.linear_2",
        "caption_projection.linear_1",
        "caption_projection.linear_2",
        "proj_out",
    ),
    call={
        "num_inference_steps": 20,
        "guidance_scale": 4.5,
        "height": 1024,
        "width": 1024,
        "max_sequence_length": 300,
    },
    mask="encoder_attention_mask",
    revision=2,  # keys and values of the text
)
