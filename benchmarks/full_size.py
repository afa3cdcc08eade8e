"""Full-size pipelines with generated weights: the real classes and shapes, no download.

The transformer has the published architecture and random weights with planted structure, as
trained models have it: a residual stream with a few outlier channels and a low-rank part that
holds most of its energy. Text encoders and autoencoders are small, in the widths it wants.
"""

import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from dirotq.assets import tiny_flux
from dirotq.assets.byte_pairs import byte_pair_tokenizer
from dirotq.models.skeleton import empty_transformer
from dirotq.sources.prompts import resolve
from dirotq.sources.weights import plan_shards, write_index

STREAM = 8
"""Directions of the residual stream that hold most of its energy."""
PROMPTS = "assets://prompts/general.jsonl"
OUTPUTS = ("to_out.0", "to_add_out", "net.2", "proj_out", "conv_point")
"""Linears that write into the residual stream."""

FLUX = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
PIXART = {
    "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4,
    "out_channels": 8, "cross_attention_dim": 1152, "caption_channels": 4096, "sample_size": 128,
    "patch_size": 2, "interpolation_scale": 2, "use_additional_conditions": False,
}  # fmt: skip
SANA = {
    "num_layers": 20, "num_attention_heads": 70, "attention_head_dim": 32, "in_channels": 32,
    "out_channels": 32, "num_cross_attention_heads": 20, "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240, "caption_channels": 2304, "sample_size": 32, "patch_size": 1,
}  # fmt: skip
SD3 = {
    "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "sample_size": 128,
    "caption_projection_dim": 1536, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}  # fmt: skip
FLUX2_KLEIN = {
    "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
    "joint_attention_dim": 7680, "guidance_embeds": False,
}  # fmt: skip
ARCHITECTURES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "flux": ("FluxTransformer2DModel", FLUX),
    "pixart_sigma": ("PixArtTransformer2DModel", PIXART),
    "sana": ("SanaTransformer2DModel", SANA),
    "sd3": ("SD3Transformer2DModel", SD3),
    "z_image": ("ZImageTransformer2DModel", {}),
    "flux2_klein": ("Flux2Transformer2DModel", FLUX2_KLEIN),
    "qwen_image": ("QwenImageTransformer2DModel", {"num_layers": 60}),
    "wan": ("WanTransformer3DModel", {"num_layers": 40}),
}
"""Classes and published configurations: FLUX.1-dev, PixArt-Sigma, SANA 1.6B, SD 3.5 medium,
Z-Image, FLUX.2-klein 4B, Qwen-Image, Wan 2.1 14B (the last ones are their classes' defaults)."""
FLUX2_DEV = {"num_layers": 8, "num_single_layers": 48, "guidance_embeds": False}
"""Without the guidance's two small linears: klein's pipeline, which gives none, runs it."""
LAYERS = ("num_layers", "num_single_layers")
"""Fields of a transformer's config that count its blocks."""

COMPRESSED: Mapping[str, tuple[str, dict[str, Any]]] = {
    **{name: ARCHITECTURES[name] for name in ("flux", "pixart_sigma", "sana", "qwen_image")},
    "flux2_dev": ("Flux2Transformer2DModel", FLUX2_DEV),
    "wan22": ARCHITECTURES["wan"],
}
"""Those that :func:`build` makes a whole pipeline of; Wan 2.2 has two transformers."""


def generated(name: str, models: Path, depth: float, device: torch.device) -> Path:
    """Return the folder of the pipeline ``name`` below ``models``, made if it is not there.

    depth  share of its blocks
    """
    folder = models / f"{name}-{depth:g}"
    if (folder / "model_index.json").exists():
        return folder
    if name not in COMPRESSED:
        raise SystemExit(f"{name} is none of {', '.join(COMPRESSED)}")
    config = COMPRESSED[name][1]
    changes = {key: max(round(config[key] * depth), 1) for key in LAYERS if key in config}
    began = time.monotonic()
    partial = folder.with_name(f"{folder.name}.partial")  # what a killed run leaves
    shutil.rmtree(partial, ignore_errors=True)
    build(name, partial, device, **changes).rename(folder)
    print(f"generated {folder} in {time.monotonic() - began:.0f} s", flush=True)
    return folder


def build(name: str, folder: Path, device: torch.device, **changes: Any) -> Path:
    """Write the pipeline ``name`` into ``folder`` and return it.

    changes  fields of the transformer's config to replace (fewer layers, narrower for a test)
    """
    cls_name, config = COMPRESSED[name]
    cls = getattr(diffusers, cls_name)
    transformer = empty_transformer(config | changes, cls)
    parts = _COMPONENTS[name](transformer.config)
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.eval().to(torch.bfloat16)
    pipeline = _PIPELINES[name](transformer=None, **parts)
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    experts = ("transformer", "transformer_2") if name == "wan22" else ("transformer",)
    index |= {expert: ["diffusers", cls_name] for expert in experts}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    for seed, expert in enumerate(experts):
        write_transformer(transformer, folder / expert, device, seed)
    return folder


def write_transformer(transformer: Any, folder: Path, device: torch.device, seed: int = 0) -> None:
    """Write its config and generated bf16 weights, in shards of 4 GB, one in memory at a time."""
    transformer.save_config(folder)
    names = transformer.state_dict()
    shards = plan_shards({name: 2 * like.numel() for name, like in names.items()}, 4 * 10**9)
    generator = torch.Generator(device).manual_seed(seed)
    for file, inside in shards.filename_to_tensors.items():
        tensors = {n: _weight(n, names[n], generator).to("cpu", torch.bfloat16) for n in inside}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    write_index(folder, shards)


def _weight(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one tensor of the network; its residual stream keeps its size over many blocks."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device)

    module, _, leaf = name.rpartition(".")
    parts = module.split(".")[-2:]
    shape = tuple(like.shape)
    modulates = any(part.startswith(("norm", "adaln")) or "mod" in part for part in parts)
    if leaf == "bias":
        return (0.5 if modulates else 0.02) * draw(*shape)
    if "norm" in module and len(shape) == 1:
        return 1 + 0.1 * draw(*shape)
    if len(shape) < 2 or "table" in leaf or "pos_embed" in leaf:
        return 0.2 * draw(*shape)
    rows, columns = shape[0], math.prod(shape[1:])
    weight = draw(rows, columns) / columns**0.5
    if module.endswith(OUTPUTS) and "." in module:
        channels = torch.exp(0.4 * draw(rows, 1))
        channels[:: max(rows // 16, 1)] *= 6  # the same outlier channels in every block
        seeded = torch.Generator(generator.device).manual_seed(rows)
        shared = torch.randn(rows, STREAM, generator=seeded, device=generator.device) / rows**0.5
        planted = shared @ draw(STREAM, columns) * (rows / (STREAM * columns)) ** 0.5
        weight = 0.2 * channels * weight + 0.5 * planted
    elif modulates:
        weight = 0.3 * weight
    return weight.reshape(shape)


def _latents(channels: int, factor: int) -> Any:
    """Make an autoencoder with the latents of the real one and hardly any parameters."""
    depth = factor.bit_length()
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * depth,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
    )


def _t5(tokenizer: Any, width: int, kind: str = "T5") -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), d_model=width, d_kv=16, d_ff=64, num_layers=1, num_heads=4,
        feed_forward_proj="relu", decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return getattr(transformers, f"{kind}EncoderModel")(config)


def captions() -> list[str]:
    """Read the general prompts, so that their words are words to the tokenizers."""
    return [json.loads(line)["prompt"] for line in resolve(PROMPTS).read_text().splitlines()]


def _flux(config: Any) -> dict[str, Any]:
    clip, t5 = tiny_flux.train_tokenizers(captions())
    text = transformers.CLIPTextConfig(
        vocab_size=len(clip), hidden_size=config.pooled_projection_dim, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=77,
        bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )  # fmt: skip
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True
        ),
        "vae": _latents(config.in_channels // 4, 8),
        "text_encoder": transformers.CLIPTextModel(text),
        "tokenizer": clip,
        "text_encoder_2": _t5(t5, config.joint_attention_dim),
        "tokenizer_2": t5,
    }


def _pixart(config: Any) -> dict[str, Any]:
    _, t5 = tiny_flux.train_tokenizers(captions())
    return {
        "scheduler": diffusers.DPMSolverMultistepScheduler(),
        "vae": _latents(config.in_channels, 8),
        "text_encoder": _t5(t5, config.caption_channels),
        "tokenizer": t5,
    }


def _sana(config: Any) -> dict[str, Any]:
    _, t5 = tiny_flux.train_tokenizers(captions())
    words = [piece for piece in t5.get_vocab() if piece not in ("<pad>", "<eos>", "<bos>", "<unk>")]
    vocabulary = {piece: i for i, piece in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *words])}
    tokenizer = transformers.GemmaTokenizer(vocab=vocabulary, merges=[])
    tokenizer.padding_side = "right"
    gemma = transformers.Gemma2Config(
        vocab_size=len(tokenizer) + 8, hidden_size=config.caption_channels, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=config.in_channels, attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 6, decoder_block_types=("ResBlock",) * 6,
        encoder_block_out_channels=(config.in_channels,) * 6,
        decoder_block_out_channels=(config.in_channels,) * 6,
        encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6,
        encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6,
        downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu",
    )  # fmt: skip
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": autoencoder,
        "text_encoder": transformers.Gemma2Model(gemma),
        "tokenizer": tokenizer,
    }


def _qwen(width: int, layers: int, cls: Any, config: Any, **more: Any) -> Any:
    """Make a language model with states of ``width`` and hardly any parameters but words."""
    return cls(
        config(
            hidden_size=width, intermediate_size=64, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=1, **more,
        )
    )  # fmt: skip


def _flux2(config: Any) -> dict[str, Any]:
    tokenizer = byte_pair_tokenizer(captions())
    # The states after layers 9, 18 and 27 are what the transformer reads.
    text = _qwen(
        config.joint_attention_dim // 3, 27, transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config, vocab_size=len(tokenizer), head_dim=32,
    )  # fmt: skip
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": diffusers.AutoencoderKLFlux2(
            block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4,
            latent_channels=config.in_channels // 4, mid_block_add_attention=False,
        ),
        "text_encoder": text,
        "tokenizer": tokenizer,
    }  # fmt: skip


def _qwen_image(config: Any) -> dict[str, Any]:
    template = diffusers.QwenImagePipeline(None, None, None, None, None).prompt_template_encode
    # The pipeline drops 34 tokens of its template, which are words.
    tokenizer = byte_pair_tokenizer([*captions(), *[template] * 4])
    width = config.joint_attention_dim
    heads = width // 128
    text = {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": heads, "num_key_value_heads": heads,
        "rope_parameters": {
            "rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6
        },
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": _video_latents(diffusers.AutoencoderKLQwenImage, config.in_channels // 4),
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(
                text_config=text, vision_config=vision | {"out_hidden_size": width}
            )
        ),
        "tokenizer": tokenizer,
    }


def _wan22(config: Any) -> dict[str, Any]:
    _, t5 = tiny_flux.train_tokenizers(captions())
    return {
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=12.0
        ),
        "vae": _video_latents(diffusers.AutoencoderKLWan, config.in_channels),
        "text_encoder": _t5(t5, config.text_dim, "UMT5"),
        "tokenizer": t5,
        "transformer_2": None,
        "boundary_ratio": 0.875,
    }


def _video_latents(cls: Any, channels: int) -> Any:
    return cls(
        base_dim=8, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.0] * channels, latents_std=[1.0] * channels,
    )  # fmt: skip


_COMPONENTS = {
    "flux": _flux, "pixart_sigma": _pixart, "sana": _sana,
    "flux2_dev": _flux2, "qwen_image": _qwen_image, "wan22": _wan22,
}  # fmt: skip
_PIPELINES = {
    "flux": diffusers.FluxPipeline,
    "pixart_sigma": diffusers.PixArtSigmaPipeline,
    "sana": diffusers.SanaPipeline,
    "flux2_dev": diffusers.Flux2KleinPipeline,
    "qwen_image": diffusers.QwenImagePipeline,
    "wan22": diffusers.WanPipeline,
}
