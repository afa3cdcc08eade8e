"""Ideogram 4: 34 blocks of one stream; a second transformer makes the unconditional branch."""

from .family import ModelFamily, SiteRule

BLOCK = "layers.*"

IDEOGRAM4 = ModelFamily(
    name="ideogram4",
    transformer="Ideogram4Transformer2DModel",
    rules=(
        SiteRule(BLOCK, ("adaln_modulation",), kind="modulator"),
        SiteRule(f"{BLOCK}.attention", ("to_q", "to_k", "to_v"), "qkv"),
        SiteRule(f"{BLOCK}.attention", ("to_out.0",)),
        SiteRule(f"{BLOCK}.feed_forward", ("w1", "w3"), "w13"),
        SiteRule(f"{BLOCK}.feed_forward", ("w2",)),
    ),
    keep=(
        "input_proj",
        "llm_cond_proj",
        "t_embedding.mlp_in",
        "t_embedding.mlp_out",
        "adaln_proj",
        "final_layer.linear",
        "final_layer.adaln_modulation",
    ),
    call={  # its guidance is a schedule of as many steps, the pipeline's default
        "num_inference_steps": 48,
        "height": 2048,
        "width": 2048,
        "max_sequence_length": 2048,
    },
)
