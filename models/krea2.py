"""Krea 2 (Raw and Turbo): fuses layers of the text's encoder, then joint blocks."""

from collections.abc import Iterator

from .family import ModelFamily, SiteRule


def _block(path: str, *, text: bool = False) -> Iterator[SiteRule]:
    # What the gate of an attention makes is multiplied with its result.
    yield SiteRule(f"{path}.attn", ("to_q", "to_k", "to_v", "to_gate"), "qkvg", text=text)
    yield SiteRule(f"{path}.attn", ("to_out.0",), text=text)
    yield SiteRule(f"{path}.ff", ("gate", "up"), "gate_up", text=text)
    yield SiteRule(f"{path}.ff", ("down",), text=text)


KREA2 = ModelFamily(
    name="krea2",
    transformer="Krea2Transformer2DModel",
    rules=(
        # One modulation for all blocks; each adds a table of its own.
        SiteRule("", ("time_mod_proj",), kind="modulator"),
        # Attention between the layers of one token: no mask of tokens has this shape.
        *_block("text_fusion.layerwise_blocks.*"),
        *_block("text_fusion.refiner_blocks.*", text=True),
        *_block("transformer_blocks.*"),
    ),
    keep=(
        "img_in",
        "time_embed.linear_1",
        "time_embed.linear_2",
        "text_fusion.projector",
        "txt_in.linear_1",
        "txt_in.linear_2",
        "final_layer.linear",
    ),
    call={  # Raw's, as its authors recommend
        "num_inference_steps": 52,
        "guidance_scale": 3.5,
        "height": 1024,
        "width": 1024,
        "max_sequence_length": 512,
    },
    mask="encoder_attention_mask",
)
