"""What an autoencoder's decoder takes of memory, from its config alone.

Counted in numbers for each pixel along an image's sides. They come from decoding with the published
configs on the meta device, every tensor counted; tests/models/test_decoding.py does so again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .autoencoders import TILE, TILED, precision

WIDTH = 256
"""Channels of a decoder's last block that no config names."""
COLOURS = 3
WHOLE, SEAMS = 2, 5
"""Copies of the image or video itself: while chunks, and while tiles, are put together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Numbers alive at a decoder's peak for each pixel, as multiples of its last channels.

    ``image``  of one image
    ``chunk``  of a video that is decoded some frames at a time, whose convolutions keep the last
               ones; 0: not so
    ``frame``  of each frame of a video that is decoded at once; 0: not so
    ``tile``   pixels along a tile's side
    ``frames`` of a tile, where tiles are cut in time too; 0: all

    Two inputs of the widest convolution are counted for its workspace and for a copy in another
    layout. FLUX.1 on an H200: 5 x 256 numbers, of which tensors of the network are 3 x 256.
    """

    image: float
    chunk: float = 0
    frame: float = 0
    tile: int = TILE
    frames: int = 0


IMAGES = Decoder(image=3 + 2)
CAUSAL = Decoder(image=18 + 2, chunk=51 + 2 * 6, tile=256)
CAUSAL_RESIDUAL = Decoder(image=23 + 2 * 2, chunk=85 + 2 * 12, tile=256)
DECODERS: Mapping[str, Decoder] = {
    "AutoencoderDC": Decoder(image=4.6 + 2),
    "AutoencoderKLHunyuanVideo": Decoder(image=5.8 + 2, frame=4.4 + 2, tile=256, frames=17),
    "AutoencoderKLLTX2Video": Decoder(image=5.8 + 1, frame=2.8 + 1),
    "AutoencoderKLQwenImage": CAUSAL,
    "AutoencoderKLQwenImage21": CAUSAL_RESIDUAL,
    "AutoencoderKLWan": CAUSAL,
}
"""Decoders by class; :data:`IMAGES` stands for all others, and their videos for one frame."""


def decoding(vae: Mapping[str, Any], height: int, width: int, frames: int) -> dict[str, Any]:
    """Return the bytes alive while an image (one frame) or video is decoded.

    ``decoding``  whole, ``tiled``  tile by tile; None where the autoencoder knows no tiles

    vae  its config
    """
    decoder = DECODERS.get(str(vae.get("_class_name")), IMAGES)
    if decoder is CAUSAL and vae.get("is_residual"):
        decoder = CAUSAL_RESIDUAL
    channels, size, pixels = _channels(vae), bytes_of(vae), height * width
    video = COLOURS * frames * pixels
    whole = channels * _alive(decoder, frames) * pixels + WHOLE * video
    tile = min(height, decoder.tile) * min(width, decoder.tile)
    at_once = min(frames, decoder.frames or frames)
    tiled = channels * _alive(decoder, at_once) * tile + SEAMS * video
    known = vae.get("_class_name") in TILED
    return {"decoding": float(size * whole), "tiled": float(size * tiled) if known else None}


def bytes_of(vae: Mapping[str, Any]) -> int:
    """Return the bytes of a number in an autoencoder, in a pipeline of 16 bits."""
    return precision(str(vae.get("_class_name")), torch.bfloat16).itemsize


def _alive(decoder: Decoder, frames: int) -> float:
    if frames > 1 and decoder.chunk:
        return decoder.chunk
    return max(decoder.image, decoder.frame * frames if frames > 1 else 0)


def _channels(vae: Mapping[str, Any]) -> float:
    """Return the channels of a decoder at full resolution, for each pixel that it makes."""
    size = vae.get("patch_size") or 1
    patch = math.prod(size) if isinstance(size, list | tuple) else size**2
    if base := vae.get("decoder_base_dim") or vae.get("base_dim"):
        return float(base) / patch
    if last := vae.get("decoder_block_out_channels"):
        return float(last[0]) / patch
    channels = vae.get("block_out_channels") or [WIDTH]
    # The last upsampling comes with the channels of the level below.
    return float(max(channels[min(1, len(channels) - 1)], 1))
