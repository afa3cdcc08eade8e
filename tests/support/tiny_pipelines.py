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
import torch
import transformers
from tiny_families import ROPE, TINY, randomize
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
    tiny = (PIPELINES | UNTABLED)[name]
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


def _t5(cls: Any = transformers.T5EncoderModel, config: Any = transformers.T5Config) -> Any:
    return cls(
        config(
            vocab_size=len(clip_and_t5()[1]),
            d_model=64,
            d_kv=32,
            d_ff=64,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def _clip(width: int, cls: Any = transformers.CLIPTextModelWithProjection) -> Any:
    tokenizer = clip_and_t5()[0]
    return cls(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=tiny_line.POOLED,
        )
    )


def _qwen_text(vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        **more,
    }


def _autoencoder(**more: Any) -> Any:
    """8 x 8 pixels to one latent with 4 channels."""
    return diffusers.AutoencoderKL(
        sample_size=32,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        mid_block_add_attention=False,
        **more,
    )


def _flow(**more: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**more)


def _flux2() -> Any:
    tokenizer = qwen_tokenizer()
    config = _qwen_text(len(tokenizer), hidden_size=32, num_hidden_layers=3, head_dim=16)
    return diffusers.Flux2KleinPipeline(
        scheduler=_flow(),
        vae=diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            mid_block_add_attention=False,
        ),
        text_encoder=transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config)),
        tokenizer=tokenizer,
        transformer=TINY["flux2"].build(joint_attention_dim=3 * 32, guidance_embeds=False),
    )


def _pixart() -> Any:
    return diffusers.PixArtSigmaPipeline(
        tokenizer=clip_and_t5()[1],
        text_encoder=_t5(),
        vae=_autoencoder(),
        transformer=TINY["pixart"].build(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def _gemma(vocabulary: int, **more: Any) -> Any:
    return transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=64,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            **more,
        )
    )


def _lumina2() -> Any:
    tokenizer = gemma_tokenizer()
    made = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=64,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=32,
        axes_dim_rope=ROPE,
        axes_lens=(64, 64, 64),
        cap_feat_dim=64,
    )
    return diffusers.Lumina2Pipeline(
        transformer=randomize(made),
        scheduler=_flow(shift=6.0),
        vae=_autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0),
        text_encoder=_gemma(len(tokenizer), num_hidden_layers=2),
        tokenizer=tokenizer,
    )


def _sana() -> Any:
    tokenizer = gemma_tokenizer()
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=_gemma(len(tokenizer), num_hidden_layers=1),
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
        scheduler=_flow(shift=3.0),
    )


def _sd3() -> Any:
    clip, t5 = clip_and_t5()
    return diffusers.StableDiffusion3Pipeline(
        transformer=TINY["sd3"].build(),
        scheduler=_flow(shift=3.0),
        vae=_autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0),
        text_encoder=_clip(32),
        tokenizer=clip,
        text_encoder_2=_clip(32),
        tokenizer_2=clip,
        text_encoder_3=_t5(),
        tokenizer_3=t5,
    )


def _video_autoencoder(cls: Any, **more: Any) -> Any:
    return cls(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        **more,
    )


def _qwen_image() -> Any:
    # The pipeline drops the template's first 34 tokens: words have to be tokens, as in its own.
    empty = diffusers.QwenImagePipeline(None, None, None, None, None)
    tokenizer = qwen_tokenizer((*[empty.prompt_template_encode] * 4, LONG_CAPTION))
    text = _qwen_text(
        len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},
    )
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision | {"out_hidden_size": 64}
    )
    return diffusers.QwenImagePipeline(
        scheduler=_flow(),
        vae=_video_autoencoder(diffusers.AutoencoderKLQwenImage),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=TINY["qwen_image"].build(),
    )


def _z_image() -> Any:
    tokenizer = qwen_tokenizer()
    config = _qwen_text(len(tokenizer), hidden_size=64, num_hidden_layers=2, head_dim=32)
    return diffusers.ZImagePipeline(
        scheduler=_flow(shift=3.0),
        vae=_autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0),
        text_encoder=transformers.Qwen3Model(transformers.Qwen3Config(**config)),
        tokenizer=tokenizer,
        transformer=TINY["z_image"].build(),
    )


def _wan(**more: Any) -> Any:
    return diffusers.WanPipeline(
        tokenizer=clip_and_t5()[1],
        text_encoder=_t5(transformers.UMT5EncoderModel, transformers.UMT5Config),
        vae=_video_autoencoder(diffusers.AutoencoderKLWan),
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
    text = _qwen_text(
        len(tokenizer),
        hidden_size=64,
        num_hidden_layers=3,
        head_dim=32,
        rope_parameters={"rope_type": "default", "mrope_section": [6, 5, 5], "rope_theta": 1e4},
    )
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    config = transformers.Qwen3VLConfig(
        text_config=text,
        vision_config=vision | {"out_hidden_size": 64, "deepstack_visual_indexes": []},
    )
    return diffusers.Krea2Pipeline(
        scheduler=_flow(use_dynamic_shifting=True),
        vae=_video_autoencoder(diffusers.AutoencoderKLQwenImage),
        text_encoder=transformers.Qwen3VLModel(config),
        tokenizer=tokenizer,
        transformer=TINY["krea2"].build(),
        text_encoder_select_layers=(1, 2, 3),
    )


def _hunyuan_video() -> Any:
    clip, _ = clip_and_t5()
    tokenizer = qwen_tokenizer()
    llama = _qwen_text(len(tokenizer), hidden_size=64, num_hidden_layers=2)
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
        scheduler=_flow(shift=7.0),
        text_encoder_2=_clip(tiny_line.POOLED, transformers.CLIPTextModel),
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
}
UNTABLED = {"lumina2": TinyPipeline(_lumina2, SHORT | {"guidance_scale": 4.0})}
"""Of classes that no family table describes."""
