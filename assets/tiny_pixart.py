"""The shape of tiny-pixart: a PixArtSigmaPipeline around a new transformer, and how it is saved.

Its tokenizer, text encoder and autoencoder are those of tiny-flux.
"""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from torch import nn
from transformers import T5EncoderModel, T5Tokenizer

from dirotq.assets.captions import T5_LENGTH
from dirotq.assets.tiny_flux import LATENT_CHANNELS, MAX_SHARD, T5_WIDTH

TIMESTEPS = 1000  # the scheduler's unit of time
GENERATION = {
    "num_inference_steps": 20,
    "height": 128,
    "width": 128,
    "max_sequence_length": T5_LENGTH,
    "use_resolution_binning": False,
    "clean_caption": False,
}
_SHIFT = 2.0
_HEADS, _HEAD_WIDTH, _BLOCKS = 5, 64, 3


def build_transformer() -> PixArtTransformer2DModel:
    """PixArt in small: 3 blocks of width 320, so no power of two; cross-attention starts silent.

    No variance is predicted: flow matching has none.
    """
    width = _HEADS * _HEAD_WIDTH
    transformer = PixArtTransformer2DModel(
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD_WIDTH,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=_BLOCKS,
        cross_attention_dim=width,
        sample_size=32,
        patch_size=2,
        caption_channels=T5_WIDTH,
        use_additional_conditions=False,
    )
    zeroed = [transformer.proj_out, transformer.adaln_single.linear]
    zeroed += [block.attn2.to_out[0] for block in transformer.transformer_blocks]
    for linear in zeroed:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def build_scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of second order along the flow, as SANA uses it (arXiv 2410.10629)."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=TIMESTEPS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=_SHIFT,
    )


def save_pipeline(
    folder: Path,
    *,
    tokenizer: T5Tokenizer,
    autoencoder: AutoencoderKL,
    t5: T5EncoderModel,
    transformer: PixArtTransformer2DModel,
    guidance: float,
) -> None:
    """Write a complete diffusers folder in bfloat16, no file above 8 MB, and generation.json."""
    pipeline = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=t5,
        vae=autoencoder,
        transformer=transformer,
        scheduler=build_scheduler(),
    )
    pipeline.to(torch.bfloat16).save_pretrained(folder, max_shard_size=MAX_SHARD)
    write_generation(folder, guidance)


def write_generation(folder: Path, guidance: float) -> None:
    """Write the pipeline's call arguments, generation.json."""
    call = GENERATION | {"guidance_scale": guidance}
    (folder / "generation.json").write_text(json.dumps(call, indent=2) + "\n")
