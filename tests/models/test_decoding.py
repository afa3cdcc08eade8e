"""What decoders are told to take, against every tensor that they make on the meta device."""

import diffusers
import pytest
import torch
from live_bytes import LiveBytes
from torch.nn import functional

from dirotq.models.autoencoders import tile
from dirotq.models.decoding import decoding

KL = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
      "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
      "sample_size": 1024}  # fmt: skip
WAN_5B = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True,
          "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
          "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}  # fmt: skip
SIDE = 512
CASES = {
    "image": ("AutoencoderKL", KL, (16, 768 // 8)),  # its tiles are as large as SIDE
    "image, patches of latents": ("AutoencoderKLFlux2", {}, (32, SIDE // 8)),
    "image, deep compression": ("AutoencoderDC", {}, (32, SIDE // 32)),
    "image, causal": ("AutoencoderKLQwenImage", {}, (16, 1, SIDE // 8)),
    "image, causal and residual": ("AutoencoderKLQwenImage21", {}, (64, 1, SIDE // 16)),
    "video in chunks": ("AutoencoderKLWan", {}, (16, 3, SIDE // 8)),
    "video in chunks, residual": ("AutoencoderKLWan", WAN_5B, (48, 3, SIDE // 16)),
    "video at once": ("AutoencoderKLHunyuanVideo", {}, (16, 3, SIDE // 8)),
    "video at once, patches": ("AutoencoderKLLTX2Video", {}, (128, 3, SIDE // 32)),
}


def decoded(name, changes, shape, in_tiles, monkeypatch):
    """Return what `decoding` says, and what was alive, in bytes."""
    # The kernels of a GPU keep no scores.
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda q, *_, **__: torch.empty_like(q)
    )
    with torch.device("meta"):
        vae = getattr(diffusers, name)(**changes).eval()
        latents = torch.empty(1, *shape, shape[-1])
    if in_tiles:
        tile(vae)
    with torch.no_grad(), LiveBytes() as live:
        made = vae.decode(latents, return_dict=False)[0]
    frames = made.shape[2] if made.ndim == 5 else 1
    config = {**vae.config, "_class_name": name}
    said = decoding(config, *made.shape[-2:], frames)["tiled" if in_tiles else "decoding"]
    wide = name == "AutoencoderKLWan"  # the others are told for 16 bits
    return said, live.peak if wide else live.peak / 2


@pytest.mark.parametrize("case", CASES)
def test_whole_images_and_videos(case, monkeypatch):
    said, alive = decoded(*CASES[case], False, monkeypatch)
    assert alive < said < 1.8 * alive, said / alive


@pytest.mark.parametrize("case", ["image", "image, causal", "video in chunks", "video at once"])
def test_tiles(case, monkeypatch):
    said, alive = decoded(*CASES[case], True, monkeypatch)
    assert alive < said < 1.9 * alive, said / alive


def test_flux_on_an_h200():
    """2.72 GB were allocated beside the weights; docs/low-vram.md."""
    said = decoding({"_class_name": "AutoencoderKL", **KL}, 1024, 1024, 1)["decoding"]
    assert said == pytest.approx(2.72e9, rel=0.02)


def test_a_class_that_nobody_measured_knows_no_tiles():
    known = decoding({"_class_name": "AutoencoderKL", **KL}, 64, 64, 1)
    assert decoding({"_class_name": "Other", **KL}, 64, 64, 1) == known | {"tiled": None}
    assert decoding({}, 64, 64, 1)["decoding"] == known["decoding"]
