"""PixArt-Sigma (and Alpha): 28 blocks of self-attention, cross-attention to the text and MLP."""

from .family import ModelFamily, SiteRule

BLOCK = "transformer_blocks.*"

PIXART = ModelFamily(
    name="pixart",
    transformer="PixArtTransformer2DModel",
    rules=(
        # One modulation for all blocks; each adds a table of its own.
        SiteRule("adaln_single", ("linear",), kind="modulator"),
        SiteRule(f"{BLOCK}.attn1", ("to_q", "to_k", "to_v"), "qkv"),
        SiteRule(f"{BLOCK}.attn1", ("to_out.0",)),
        SiteRule(f"{BLOCK}.attn2", ("to_q",)),
        # Of the text, which is short: next to no time, but 12% of the weights.
        SiteRule(f"{BLOCK}.attn2", ("to_k", "to_v"), "kv", kind="modulator", text=True),
        SiteRule(f"{BLOCK}.attn2", ("to_out.0",)),
        SiteRule(f"{BLOCK}.ff", ("net.0.proj",)),
        SiteRule(f"{BLOCK}.ff", ("net.2",)),
    ),
    keep=(
        "adaln_single.emb.*.linear_1",
        "adaln_single.emb.*.linear_2",
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
