"""Pipelines of published shapes without weights: enough to tell what they will need."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from dirotq.benchmarks.full_size import ARCHITECTURES, COMPRESSED

PIPELINES = {
    "flux": ("FluxPipeline", {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16}),
    "pixart_sigma": ("PixArtSigmaPipeline", {"block_out_channels": [8] * 4, "latent_channels": 4}),
    "wan22": ("WanPipeline", {"dim_mult": [1, 2, 4, 4], "base_dim": 96}),
    "sana": ("SanaPipeline", {"block_out_channels": [8] * 6, "latent_channels": 32}),
}


def write_shapes(name: str, folder: Path) -> Path:
    """Write the pipeline's configurations; where weights belong lies one number."""
    cls, config = (ARCHITECTURES | COMPRESSED)[name]
    pipeline, vae = PIPELINES[name]
    experts = ("transformer", "transformer_2") if name == "wan22" else ("transformer",)
    values_of = dict.fromkeys(experts, {"_class_name": cls} | config) | {"vae": vae}
    for part, values in values_of.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(values))
        # Whatever it holds: only its being there is looked at.
        save_file({"x": torch.zeros(1)}, folder / part / "diffusion_pytorch_model.safetensors")
    index = {
        "_class_name": pipeline,
        **{expert: ["diffusers", cls] for expert in experts},
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
