"""Seconds of a whole image: text encoder, steps, autoencoder, as diffusers' pipeline runs them.

Text encoders and autoencoders have the published shapes and random 16-bit weights, made on the
device; they are the same for every contestant, and nobody compiles them. Vocabularies are small.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from dirotq.assets import tiny_flux
from dirotq.assets.byte_pairs import byte_pair_tokenizer
from dirotq.benchmarks.full_size import captions

TEXT, DECODER = "text encoder", "autoencoder"
PARTS = (TEXT, DECODER)
"""Timed apart; the rest of an image is steps."""
REPEATS = 3

CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12}  # fmt: skip
T5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
QWEN3 = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
AUTOENCODER = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
               "latent_channels": 16}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Fields of the text encoders' and the autoencoder's configs; a test makes them small."""

    clip: Mapping[str, Any] = field(default_factory=lambda: CLIP)
    t5: Mapping[str, Any] = field(default_factory=lambda: T5)
    qwen: Mapping[str, Any] = field(default_factory=lambda: QWEN3)
    autoencoder: Mapping[str, Any] = field(default_factory=lambda: AUTOENCODER)


@dataclass(frozen=True)
class Whole:
    """``parts`` of a pipeline without its transformer; arguments of an image and of its text."""

    pipeline: Any
    parts: Mapping[str, Any]
    call: Mapping[str, Any]
    text: Mapping[str, Any] = field(default_factory=dict)

    def of(self, transformer: Any) -> Any:
        """Return the pipeline around a transformer."""
        made = self.pipeline(transformer=transformer, **self.parts)
        made.set_progress_bar_config(disable=True)
        return made


def whole(model: str, device: str, sizes: Sizes | None = None) -> Whole:
    """Make everything but the transformer of ``flux`` or ``z_image``, on the device."""
    made: Whole = _MAKERS[model](sizes or Sizes(), torch.device(device))
    for part in made.parts.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return made


def seconds(made: Whole, transformer: Any, side: int) -> Iterator[tuple[str, float]]:
    """Time an image and its parts; medians. The part "" is the whole image.

    Two short images come first: they compile, and record the graph of these shapes.
    """
    pipe = made.of(transformer)
    device = next(transformer.parameters()).device
    prompt = " ".join(captions()[:8])

    def image(**more: Any) -> Any:
        given = {"prompt": prompt, "height": side, "width": side, "output_type": "pt"}
        return pipe(**given | made.call | more)

    @torch.no_grad()
    def encode() -> Any:
        return pipe.encode_prompt(prompt=prompt, device=device, **made.text)

    @torch.no_grad()
    def decode() -> Any:
        return pipe.vae.decode(latents, return_dict=False)

    latent = side // pipe.vae_scale_factor
    shape = 1, pipe.vae.config.latent_channels, latent, latent
    latents = torch.randn(shape, device=device, dtype=torch.bfloat16)
    for _ in range(2):
        image(num_inference_steps=2)
    yield "", _median(image, device)
    yield TEXT, _median(encode, device)
    yield DECODER, _median(decode, device)


def _median(work: Callable[[], Any], device: torch.device) -> float:
    took = []
    for _ in range(REPEATS):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _flux(sizes: Sizes, device: torch.device) -> Whole:
    """FLUX.1-dev: CLIP-L and T5-XXL, 28 steps."""
    clip, t5 = tiny_flux.train_tokenizers(captions())
    ends = {f"{name}_token_id": getattr(clip, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = transformers.CLIPTextConfig(
        vocab_size=len(clip), max_position_embeddings=77, **ends, **sizes.clip
    )
    second = transformers.T5Config(
        vocab_size=len(t5), feed_forward_proj="gated-gelu", dropout_rate=0.0,
        decoder_start_token_id=t5.pad_token_id, **sizes.t5,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    parts = {
        "scheduler": scheduler,
        "vae": _random(lambda: _autoencoder(sizes, 0.3611, 0.1159), device),
        "text_encoder": _random(lambda: transformers.CLIPTextModel(text), device),
        "tokenizer": clip,
        "text_encoder_2": _random(lambda: transformers.T5EncoderModel(second), device),
        "tokenizer_2": t5,
    }
    call = {"num_inference_steps": 28, "guidance_scale": 3.5}
    return Whole(diffusers.FluxPipeline, parts, call)


def _z_image(sizes: Sizes, device: torch.device) -> Whole:
    """Z-Image-Turbo: Qwen3-4B, 9 steps, no guidance."""
    tokenizer = byte_pair_tokenizer(captions())
    config = transformers.Qwen3Config(vocab_size=len(tokenizer), **sizes.qwen)
    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": _random(lambda: _autoencoder(sizes, 0.3611, 0.1159), device),
        "text_encoder": _random(lambda: transformers.Qwen3Model(config), device),
        "tokenizer": tokenizer,
    }
    call = {"num_inference_steps": 9, "guidance_scale": 0.0}
    text = {"do_classifier_free_guidance": False}
    return Whole(diffusers.ZImagePipeline, parts, call, text)


_MAKERS = {"flux": _flux, "z_image": _z_image}


def _random(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """Build with the class's own random weights, straight on the device in bf16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return build()
    finally:
        torch.set_default_dtype(before)


def _autoencoder(sizes: Sizes, scale: float, shift: float) -> nn.Module:
    """16 latent channels of 8 x 8 pixels, as FLUX.1 and Z-Image have it."""
    depth = len(sizes.autoencoder["block_out_channels"])
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        sample_size=1024, scaling_factor=scale, shift_factor=shift,
        use_quant_conv=False, use_post_quant_conv=False, **sizes.autoencoder,
    )  # fmt: skip
