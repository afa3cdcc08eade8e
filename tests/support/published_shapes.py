"""Pipelines of published shapes without weights: enough to tell what they will need."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from dirotq.benchmarks.full_size import ARCHITECTURES

PIPELINES = {
    "flux": ("FluxPipeline", {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16}),
    "pixart_sigma": ("PixArtSigmaPipeline", {"block_out_channels": [8] * 4, "latent_channels": 4}),
    "sana": ("SanaPipeline", {"block_out_channels": [8] * 6, "latent_channels": 32}),
}


def write_shapes(name: str, folder: Path) -> Path:
    """Write the pipeline's configurations; where weights belong lies one number."""
    cls, config = ARCHITECTURES[name]
    pipeline, vae = PIPELINES[name]
    for part, values in (("transformer", {"_class_name": cls} | config), ("vae", vae)):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(values))
        # Whatever it holds: only its being there is looked at.
        save_file({"x": torch.zeros(1)}, folder / part / "diffusion_pytorch_model.safetensors")
    index = {
        "_class_name": pipeline,
        "transformer": ["diffusers", cls],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
