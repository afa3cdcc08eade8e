"""Z-Image (and Turbo): two refiners, of the image and of the text, then joint blocks."""

from collections.abc import Iterator

from .family import ModelFamily, SiteRule


def _block(path: str, *, text: bool = False) -> Iterator[SiteRule]:
    # The text's refiner has no modulation.
    yield SiteRule(path, ("adaLN_modulation.0",), kind="modulator")
    yield SiteRule(f"{path}.attention", ("to_q", "to_k", "to_v"), "qkv", text=text)
    yield SiteRule(f"{path}.attention", ("to_out.0",), text=text)
    yield SiteRule(f"{path}.feed_forward", ("w1", "w3"), "w13", text=text)
    yield SiteRule(f"{path}.feed_forward", ("w2",), text=text)


Z_IMAGE = ModelFamily(
    name="z_image",
    transformer="ZImageTransformer2DModel",
    rules=(
        *_block("noise_refiner.*"),
        *_block("context_refiner.*", text=True),
        *_block("layers.*"),
    ),
    keep=(
        "all_x_embedder.*",
        "cap_embedder.1",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "all_final_layer.*.linear",
        "all_final_layer.*.adaLN_modulation.1",
    ),
    call={  # Turbo's: its last step costs no call of the denoiser
        "num_inference_steps": 9,
        "guidance_scale": 0.0,
        "height": 1024,
        "width": 1024,
        "max_sequence_length": 512,
    },
)
