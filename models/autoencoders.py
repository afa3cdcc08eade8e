"""Autoencoders: the precision that they need, and how they decode an image in tiles."""

from typing import Any

import torch

TILE = 512
"""Pixels along a tile's side."""
TILED = frozenset(
    {
        "AutoencoderDC", "AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLHunyuanVideo",
        "AutoencoderKLLTX2Video", "AutoencoderKLQwenImage", "AutoencoderKLQwenImage21",
        "AutoencoderKLWan",
    }
)  # fmt: skip
"""Classes that decode in tiles of TILE pixels or less."""
WIDE = frozenset({"AutoencoderKLWan"})
"""Classes that decode in float32, as diffusers' examples have them: 16 bits lose quality."""
NO_HALF = WIDE | {"AutoencoderDC", "AutoencoderKLQwenImage", "AutoencoderKLQwenImage21"}
"""Classes trained in bfloat16 or float32, whose activations float16 may not hold. Their pipelines
cast latents to the autoencoder's dtype. Of AutoencoderKL diffusers' pipelines heed the config's
``force_upcast`` themselves."""


def precision(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of an autoencoder of class ``name`` in a pipeline of ``dtype``."""
    wide = (name in NO_HALF and dtype == torch.float16) or (
        name in WIDE and dtype == torch.bfloat16
    )
    return torch.float32 if wide else dtype


def tile(vae: Any) -> None:
    """Let an autoencoder of :data:`TILED` decode tile by tile: less memory, other seams."""
    if hasattr(vae, "tile_latent_min_size"):  # these come with one tile of the training's size
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        vae.tile_sample_min_size = min(vae.tile_sample_min_size, TILE)
        vae.tile_latent_min_size = vae.tile_sample_min_size // scale
    vae.enable_tiling()
