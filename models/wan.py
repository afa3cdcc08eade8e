"""Wan (video): 3D self-attention, cross-attention to the text (and to an image) and MLP."""

from .family import ModelFamily, SiteRule

BLOCK = "blocks.*"

WAN = ModelFamily(
    name="wan",
    transformer="WanTransformer3DModel",
    rules=(
        # One modulation for all blocks; each adds a table of its own.
        SiteRule("condition_embedder", ("time_proj",), kind="modulator"),
        SiteRule(f"{BLOCK}.attn1", ("to_q", "to_k", "to_v"), "qkv"),
        SiteRule(f"{BLOCK}.attn1", ("to_out.0",)),
        SiteRule(f"{BLOCK}.attn2", ("to_q",)),
        # Of the text, which is short: next to no time, but 15% of the weights.
        SiteRule(f"{BLOCK}.attn2", ("to_k", "to_v"), "kv", kind="modulator", text=True),
        SiteRule(f"{BLOCK}.attn2", ("to_out.0",)),
        SiteRule(f"{BLOCK}.ffn", ("net.0.proj",)),
        SiteRule(f"{BLOCK}.ffn", ("net.2",)),
    ),
    keep=(
        f"{BLOCK}.attn2.add_k_proj",  # of the image, in image-to-video models of Wan 2.1
        f"{BLOCK}.attn2.add_v_proj",
        "condition_embedder.image_embedder.ff.net.0.proj",
        "condition_embedder.image_embedder.ff.net.2",
        "condition_embedder.text_embedder.linear_1",
        "condition_embedder.text_embedder.linear_2",
        "condition_embedder.time_embedder.linear_1",
        "condition_embedder.time_embedder.linear_2",
        "proj_out",
    ),
    call={
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
        "height": 480,
        "width": 832,
        "num_frames": 81,
        "max_sequence_length": 512,
    },
    revision=2,  # keys and values of the text
)
