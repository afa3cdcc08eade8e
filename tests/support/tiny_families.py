"""A tiny random transformer of every model family, with the arguments of one call of it.

Every parameter is random and none is zero: closed gates would hide every error. Sizes are chosen
so that each family shows what is special about it: SANA's inner channels (160) and Z-Image's width
(96) are no multiples of 64, SD3 has a dual attention block and a last block without a text MLP.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from tiny_line import POOLED, TEXT, build_transformer
from torch import Tensor, nn

from dirotq.models.families import family_of
from dirotq.models.family import ModelFamily

HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}
ROPE = (8, 12, 12)
TOKENS = 5
"""Text tokens of a call."""


@dataclass(frozen=True)
class TinyFamily:
    """``build`` makes a transformer with other configuration values where they are given.

    ``text``       channels of a text embedding
    ``tokens``     rows that a site of the text stream sees for each image
    ``tolerance``  of float64 comparisons; larger where the model itself computes in float32
    """

    build: Callable[..., Any]
    inputs: Callable[[], dict[str, Any]]
    text: int = 64
    tokens: int = TOKENS
    tolerance: float = 1e-9

    @property
    def family(self) -> ModelFamily:
        return family_of(type(self.build()).__name__)


def randomize(module: nn.Module, seed: int = 0) -> Any:
    """Give every parameter a random value near what its initialization meant; eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def noise(parameter: Tensor, std: float) -> Tensor:
        return std * torch.randn(parameter.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            owner = module.get_submodule(name.rpartition(".")[0])
            if parameter.ndim > 1 and isinstance(owner, nn.Linear | nn.Conv2d | nn.Conv3d):
                gain = 0.3 if any(word in name for word in ("norm", "mod", "time_", "ada")) else 1.0
                parameter.copy_(noise(parameter, gain * parameter[0].numel() ** -0.5))
            elif parameter.ndim == 1 or not parameter.any():
                parameter.add_(noise(parameter, 0.05))
    return module.eval()


def _maker(cls: Any, **config: Any) -> Callable[..., Any]:
    def build(seed: int = 0, **changes: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return randomize(cls(**config | changes), seed)

    return build


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


def _mask(*lengths: int) -> Tensor:
    return (torch.arange(TOKENS) < torch.tensor(lengths)[:, None]).long()


def _flux() -> dict[str, Any]:
    return {
        "hidden_states": _random(2, 9, 16),
        "encoder_hidden_states": _random(2, TOKENS, TEXT),
        "pooled_projections": _random(2, POOLED),
        "timestep": torch.tensor([0.3, 0.8]),
        "guidance": torch.tensor([3.5, 1.0]),
        "img_ids": torch.arange(27).reshape(9, 3) % 3,
        "txt_ids": torch.zeros(TOKENS, 3),
    }


def _flux2() -> dict[str, Any]:
    return {
        "hidden_states": _random(2, 9, 16),
        "encoder_hidden_states": _random(2, TOKENS, 64),
        "timestep": torch.tensor([0.3, 0.8]),
        "guidance": torch.tensor([3.5, 1.0]),
        "img_ids": (torch.arange(36).reshape(1, 9, 4) % 3).expand(2, -1, -1),
        "txt_ids": torch.zeros(2, TOKENS, 4),
    }


def _cross(channels: int, *size: int) -> dict[str, Any]:
    """Of the families that read the text by cross-attention."""
    return {
        "hidden_states": _random(2, channels, *size),
        "encoder_hidden_states": _random(2, TOKENS, 64),
        "timestep": torch.tensor([300, 800]),
    }


def _qwen_image() -> dict[str, Any]:
    return {
        "hidden_states": _random(2, 9, 16),
        "encoder_hidden_states": _random(2, TOKENS, 64),
        "encoder_hidden_states_mask": _mask(TOKENS, 3),
        "timestep": torch.tensor([0.3, 0.8]),
        "img_shapes": [[(1, 3, 3)]] * 2,
    }


def _z_image() -> dict[str, Any]:
    return {
        "x": [_random(4, 1, 16, 16), _random(4, 1, 16, 16)],
        "t": torch.tensor([0.3, 0.8]),
        "cap_feats": [_random(20, 64), _random(30, 64)],
    }


def _with_mask(inputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    return inputs | {"encoder_attention_mask": _mask(TOKENS, 3)} | more


def _qwen_image21() -> dict[str, Any]:
    image = [False] * TOKENS + [True] * 4  # a place for four tokens of the image each
    return {
        "hidden_states": _random(2, 16, 16),
        "encoder_hidden_states": _random(2, TOKENS, 64),
        "encoder_hidden_states_mask": _mask(TOKENS, 3).bool(),
        "timestep": torch.tensor([0.3, 0.8]),
        "img_shapes": [[(1, 4, 4)]] * 2,
        "img_mask": torch.tensor([image] * 2),
    }


def _krea2() -> dict[str, Any]:
    return {
        "hidden_states": _random(2, 9, 16),
        "encoder_hidden_states": _random(2, TOKENS, 3, 64),
        "encoder_attention_mask": _mask(TOKENS, 3).bool(),
        "timestep": torch.tensor([0.3, 0.8]),
        "position_ids": torch.arange(TOKENS + 9)[:, None].expand(-1, 3),
    }


def _ideogram4() -> dict[str, Any]:
    whole = TOKENS + 9
    return {
        "hidden_states": _random(2, whole, 16),
        "encoder_hidden_states": _random(2, whole, 64),
        "timestep": torch.tensor([0.3, 0.8]),
        "position_ids": torch.arange(whole)[None, :, None].expand(2, -1, 3),
        "segment_ids": torch.ones(2, whole, dtype=torch.long),
        "indicator": torch.tensor([3] * TOKENS + [2] * 9).expand(2, -1),
    }


def _hunyuan_video() -> dict[str, Any]:
    more = {"guidance": torch.tensor([6000, 1000]), "pooled_projections": _random(2, POOLED)}
    return _with_mask(_cross(4, 2, 8, 8), **more)


def _ltx2() -> dict[str, Any]:
    return {
        **_with_mask(_cross(12, 4), audio_encoder_attention_mask=_mask(TOKENS, 3)),
        "audio_hidden_states": _random(2, 7, 4),
        "audio_encoder_hidden_states": _random(2, TOKENS, 64),
        **{"num_frames": 1, "height": 3, "width": 4, "audio_num_frames": 7},
    }


TINY = {
    "flux": TinyFamily(build_transformer, _flux, TEXT),
    "flux2": TinyFamily(
        _maker(
            diffusers.Flux2Transformer2DModel,
            **HEADS,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=64,
            timestep_guidance_channels=32,
            axes_dims_rope=(8, 8, 8, 8),
        ),
        _flux2,
    ),
    "pixart": TinyFamily(
        _maker(
            diffusers.PixArtTransformer2DModel,
            **HEADS,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=64,
            sample_size=8,
            patch_size=2,
            caption_channels=64,
            use_additional_conditions=False,
            interpolation_scale=1,
        ),
        lambda: _with_mask(
            _cross(4, 8, 8), added_cond_kwargs={"resolution": None, "aspect_ratio": None}
        ),
    ),
    "sana": TinyFamily(
        _maker(
            diffusers.SanaTransformer2DModel,
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=32,
            cross_attention_dim=64,
            caption_channels=64,
            sample_size=8,
        ),
        lambda: _with_mask(_cross(4, 4, 6)),
    ),
    "sd3": TinyFamily(
        _maker(
            diffusers.SD3Transformer2DModel,
            **HEADS,
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            joint_attention_dim=64,
            caption_projection_dim=64,
            pooled_projection_dim=2 * POOLED,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        lambda: _cross(4, 8, 8) | {"pooled_projections": _random(2, 2 * POOLED)},
    ),
    "qwen_image": TinyFamily(
        _maker(
            diffusers.QwenImageTransformer2DModel,
            **HEADS,
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            joint_attention_dim=64,
            axes_dims_rope=ROPE,
        ),
        _qwen_image,
    ),
    "z_image": TinyFamily(
        _maker(
            diffusers.ZImageTransformer2DModel,
            in_channels=4,
            dim=96,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=3,
            n_kv_heads=3,
            cap_feat_dim=64,
            axes_dims=list(ROPE),
            axes_lens=[256, 64, 64],
        ),
        _z_image,
        tokens=32,  # padded to a multiple of 32
        tolerance=1e-5,
    ),
    "wan": TinyFamily(
        _maker(
            diffusers.WanTransformer3DModel,
            **HEADS,
            in_channels=4,
            out_channels=4,
            text_dim=64,
            freq_dim=32,
            ffn_dim=128,
            num_layers=2,
        ),
        lambda: _cross(4, 2, 8, 8),
        tolerance=1e-5,
    ),
    "qwen_image21": TinyFamily(
        _maker(
            diffusers.QwenImage21Transformer2DModel,
            **HEADS,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            context_in_dim=64,
            axes_dims_rope=ROPE,
        ),
        _qwen_image21,
    ),
    "krea2": TinyFamily(
        _maker(
            diffusers.Krea2Transformer2DModel,
            **HEADS,
            in_channels=16,
            num_layers=2,
            num_key_value_heads=1,
            intermediate_size=128,
            timestep_embed_dim=32,
            text_hidden_dim=64,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=64,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=ROPE,
        ),
        _krea2,
    ),
    "ideogram4": TinyFamily(
        _maker(
            diffusers.Ideogram4Transformer2DModel,
            **HEADS,
            in_channels=16,
            num_layers=2,
            intermediate_size=128,
            adaln_dim=32,
            llm_features_dim=64,
            mrope_section=(6, 5, 5),
        ),
        _ideogram4,
    ),
    "hunyuan_video": TinyFamily(
        _maker(
            diffusers.HunyuanVideoTransformer3DModel,
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=64,
            pooled_projection_dim=POOLED,
            rope_axes_dim=ROPE,
        ),
        _hunyuan_video,
    ),
    "ltx2": TinyFamily(
        _maker(
            diffusers.LTX2VideoTransformer3DModel,
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=64,
            caption_channels=64,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=16,
            audio_cross_attention_dim=32,
        ),
        _ltx2,
    ),
}
