"""Whole pipelines around the tiny transformers: every weight random, every tokenizer in memory."""

import functools
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import tiny_line
import tiny_newer_pipelines as newer
import tiny_parts as parts
import tiny_untabled_pipelines as untabled
import torch
import transformers
from tiny_families import TINY
from tiny_tokenizers import LONG_CAPTION, clip_and_t5, gemma_tokenizer, qwen_tokenizer


@dataclass(frozen=True)
class TinyPipeline:
    """``build`` makes the pipeline; ``call`` holds the arguments that a tiny one needs."""

    build: Callable[[], diffusers.DiffusionPipeline]
    call: dict[str, Any]


@functools.cache
def family_folder(root: Path, name: str) -> Path:
    """The folder of the family's tiny pipeline under ``root``, written once per process."""
    if name == "flux":
        return tiny_line.model_folder(root)
    tiny = (PIPELINES | UNTABLED | PICTURED)[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = tiny.build()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.bfloat16).eval()
    folder = root / name
    pipeline.save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps(tiny.call))
    return folder


def _flux2() -> Any:
    tokenizer = qwen_tokenizer()
    config = parts.qwen_text(len(tokenizer), hidden_size=32, num_hidden_layers=3, head_dim=16)
    return diffusers.Flux2KleinPipeline(
        scheduler=parts.flow(),
        vae=parts.flux2_autoencoder(),
        text_encoder=transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config)),
        tokenizer=tokenizer,
        transformer=TINY["flux2"].build(joint_attention_dim=3 * 32, guidance_embeds=False),
    )


def _pixart() -> Any:
    return diffusers.PixArtSigmaPipeline(
        tokenizer=clip_and_t5()[1],
        text_encoder=parts.t5(),
        vae=parts.autoencoder(),
        transformer=TINY["pixart"].build(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def _sana() -> Any:
    tokenizer = gemma_tokenizer()
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=parts.gemma(len(tokenizer), num_hidden_layers=1),
        vae=diffusers.AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock",) * 3,
            decoder_block_types=("ResBlock",) * 3,
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
        ),
        transformer=TINY["sana"].build(),
        scheduler=parts.flow(shift=3.0),
    )


def _sd3() -> Any:
    clip, t5 = clip_and_t5()
    return diffusers.StableDiffusion3Pipeline(
        transformer=TINY["sd3"].build(),
        scheduler=parts.flow(shift=3.0),
        vae=parts.autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0),
        text_encoder=parts.clip(32),
        tokenizer=clip,
        text_encoder_2=parts.clip(32),
        tokenizer_2=clip,
        text_encoder_3=parts.t5(),
        tokenizer_3=t5,
    )


def _qwen_image() -> Any:
    # The pipeline drops the template's first 34 tokens: words have to be tokens, as in its own.
    empty = diffusers.QwenImagePipeline(None, None, None, None, None)
    tokenizer = qwen_tokenizer((*[empty.prompt_template_encode] * 4, LONG_CAPTION))
    config = parts.qwen25_vl(tokenizer, hidden_size=64, num_hidden_layers=1)
    return diffusers.QwenImagePipeline(
        scheduler=parts.flow(),
        vae=parts.video_autoencoder(diffusers.AutoencoderKLQwenImage),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=TINY["qwen_image"].build(),
    )


def _z_image() -> Any:
    tokenizer = qwen_tokenizer()
    config = parts.qwen_text(len(tokenizer), hidden_size=64, num_hidden_layers=2, head_dim=32)
    return diffusers.ZImagePipeline(
        scheduler=parts.flow(shift=3.0),
        vae=parts.autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0),
        text_encoder=transformers.Qwen3Model(transformers.Qwen3Config(**config)),
        tokenizer=tokenizer,
        transformer=TINY["z_image"].build(),
    )


def _wan(**more: Any) -> Any:
    return diffusers.WanPipeline(
        tokenizer=clip_and_t5()[1],
        text_encoder=parts.t5(transformers.UMT5EncoderModel, transformers.UMT5Config),
        vae=parts.video_autoencoder(diffusers.AutoencoderKLWan),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=TINY["wan"].build(),
        **more,
    )


def _wan22() -> Any:
    """Two experts: of three steps the second is at timestep 857 of 1000, the last at 600."""
    return _wan(transformer_2=TINY["wan"].build(seed=1), boundary_ratio=0.75)


def _wan_i2v() -> Any:
    """Of Wan 2.1: beside the latents of the picture, the transformer reads an encoding of it."""
    # A package that mends texts, which it calls without looking whether it is there.
    module: Any = importlib.import_module("diffusers.pipelines.wan.pipeline_wan_i2v")
    module.ftfy = SimpleNamespace(fix_text=str)
    clip = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=16,
    )  # fmt: skip
    size = {"height": 32, "width": 32}
    kept = {k: v for k, v in _wan().components.items() if not k.startswith("transformer")}
    return diffusers.WanImageToVideoPipeline(
        **kept,
        transformer=TINY["wan"].build(in_channels=12, image_dim=32, added_kv_proj_dim=64),
        image_encoder=transformers.CLIPVisionModel(clip),
        image_processor=transformers.CLIPImageProcessor(size=size, crop_size=size),
    )


def _krea2() -> Any:
    # As with Qwen-Image, 34 tokens of the template are dropped.
    empty = diffusers.Krea2Pipeline(None, None, None, None, None)
    tokenizer = qwen_tokenizer((*[empty.prompt_template_encode_prefix] * 4, LONG_CAPTION))
    config = parts.qwen3_vl(tokenizer, hidden_size=64, num_hidden_layers=3, head_dim=32)
    return diffusers.Krea2Pipeline(
        scheduler=parts.flow(use_dynamic_shifting=True),
        vae=parts.video_autoencoder(diffusers.AutoencoderKLQwenImage),
        text_encoder=transformers.Qwen3VLModel(config),
        tokenizer=tokenizer,
        transformer=TINY["krea2"].build(),
        text_encoder_select_layers=(1, 2, 3),
    )


def _hunyuan_video() -> Any:
    clip, _ = clip_and_t5()
    tokenizer = qwen_tokenizer()
    llama = parts.qwen_text(len(tokenizer), hidden_size=64, num_hidden_layers=2)
    return diffusers.HunyuanVideoPipeline(
        text_encoder=transformers.LlamaModel(transformers.LlamaConfig(**llama)),
        tokenizer=tokenizer,
        transformer=TINY["hunyuan_video"].build(guidance_embeds=True),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            mid_block_add_attention=False,
        ),
        scheduler=parts.flow(shift=7.0),
        text_encoder_2=parts.clip(tiny_line.POOLED, transformers.CLIPTextModel),
        tokenizer_2=clip,
    )


CALL = {"num_inference_steps": 3, "height": 64, "width": 64}
SHORT = CALL | {"max_sequence_length": 16}

PIPELINES = {
    "flux2": TinyPipeline(
        _flux2, SHORT | {"guidance_scale": 4.0, "text_encoder_out_layers": [1, 2, 3]}
    ),
    "pixart": TinyPipeline(
        _pixart,
        SHORT | {"guidance_scale": 4.5, "use_resolution_binning": False, "clean_caption": False},
    ),
    "sana": TinyPipeline(
        _sana,
        SHORT
        | {
            "height": 32,
            "width": 32,
            "guidance_scale": 4.5,
            "use_resolution_binning": False,
            "complex_human_instruction": [],
        },
    ),
    "sd3": TinyPipeline(_sd3, SHORT | {"guidance_scale": 7.0}),
    "qwen_image": TinyPipeline(_qwen_image, CALL | {"max_sequence_length": 64}),
    "z_image": TinyPipeline(_z_image, CALL | {"guidance_scale": 2.0, "max_sequence_length": 64}),
    "wan": TinyPipeline(_wan, SHORT | {"guidance_scale": 5.0, "num_frames": 5}),
    "wan_i2v": TinyPipeline(_wan_i2v, SHORT | {"guidance_scale": 5.0, "num_frames": 5}),
    "wan22": TinyPipeline(
        _wan22, SHORT | {"guidance_scale": 4.0, "guidance_scale_2": 3.0, "num_frames": 5}
    ),
    "krea2": TinyPipeline(_krea2, CALL | {"guidance_scale": 3.5, "max_sequence_length": 64}),
    "hunyuan_video": TinyPipeline(
        _hunyuan_video,
        SHORT | {"num_frames": 5, "prompt_template": {"template": "{}", "crop_start": 0}},
    ),
    "qwen_image21": TinyPipeline(
        newer.qwen_image21, CALL | {"use_kv_cache": False, "output_resolution": 64}
    ),
    "ideogram4": TinyPipeline(
        newer.ideogram4,
        CALL
        | {"num_inference_steps": 2, "guidance_schedule": [7.0, 3.0], "max_sequence_length": 192},
    ),
    "ltx2": TinyPipeline(
        newer.ltx2,
        SHORT
        | {"num_inference_steps": 2, "guidance_scale": 3.0, "num_frames": 3}
        | {"height": 32, "width": 32},
    ),
    "qwen_image_edit": TinyPipeline(newer.qwen_image_edit, CALL | {"num_inference_steps": 2}),
    "qwen_image_edit_plus": TinyPipeline(
        newer.qwen_image_edit_plus, CALL | {"num_inference_steps": 2}
    ),
}
UNTABLED = {
    "lumina2": TinyPipeline(untabled.lumina2, SHORT | {"guidance_scale": 4.0}),
    "chroma": TinyPipeline(untabled.chroma, SHORT | {"guidance_scale": 3.0}),
    "auraflow": TinyPipeline(untabled.auraflow, SHORT | {"guidance_scale": 3.5}),
    "cogview4": TinyPipeline(untabled.cogview4, SHORT | {"guidance_scale": 3.5}),
    "hunyuan_image": TinyPipeline(untabled.hunyuan_image, CALL),
    "hunyuan_video15": TinyPipeline(untabled.hunyuan_video15, CALL | {"num_frames": 5}),
}
"""Of classes that no family table describes."""
PICTURED = {
    "flux_kontext": TinyPipeline(
        newer.flux_kontext, tiny_line.CALL | {"max_area": 1024, "_auto_resize": False}
    ),
    "flux_fill": TinyPipeline(newer.flux_fill, tiny_line.CALL),
}
"""FLUX.1's that begin with a picture."""
