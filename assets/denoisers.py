"""What the diffusion training trains: a transformer with its text encoders, of FLUX and of PixArt.

B batch, T image tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from dirotq.assets import tiny_pixart
from dirotq.assets.captions import T5_LENGTH
from dirotq.assets.color_roles import NO_ROLE
from dirotq.assets.tiny_flux import build_clip, build_t5, build_transformer
from dirotq.assets.training_pool import Pool


class Denoiser(ABC):
    """Predicts the velocity noise - clean of latents at a time in [0, 1] (1: noise alone)."""

    t5: T5EncoderModel

    @abstractmethod
    def modules(self) -> tuple[nn.Module, ...]:
        """The networks that are trained."""

    @abstractmethod
    def encode(self, pool: Pool, chosen: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Conditions for `velocity`, T5's states [B, 48, width] first; roles [B, 48] to learn."""

    @abstractmethod
    def velocity(self, mixed: Tensor, time: Tensor, *conditions: Tensor) -> Tensor:
        """Velocity of `mixed`, in the form that `pack` gives latents; time [B]."""

    def pack(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, 32, 32] as the transformer takes them."""
        return latents

    def parameters(self) -> list[Tensor]:
        return [p for module in self.modules() for p in module.parameters()]


@dataclass(frozen=True, slots=True, kw_only=True)
class FluxDenoiser(Denoiser):
    """tiny-flux: one sequence of text and image tokens, and CLIP's pooled text."""

    transformer: FluxTransformer2DModel
    clip: CLIPTextModel
    t5: T5EncoderModel

    @classmethod
    def untrained(cls, tokenizers: tuple[CLIPTokenizer, T5Tokenizer]) -> Self:
        """Fresh weights, on the CPU."""
        clip, t5 = build_clip(tokenizers[0]), build_t5(tokenizers[1])
        return cls(transformer=build_transformer(), clip=clip, t5=t5)

    @classmethod
    def trained(cls, folder: Path) -> Self:
        """The networks of the diffusers pipeline in `folder`, on the CPU."""
        return cls(
            transformer=FluxTransformer2DModel.from_pretrained(folder / "transformer"),
            clip=CLIPTextModel.from_pretrained(folder / "text_encoder"),
            t5=T5EncoderModel.from_pretrained(folder / "text_encoder_2"),
        )

    def modules(self) -> tuple[nn.Module, ...]:
        return self.transformer, self.clip, self.t5

    def encode(self, pool: Pool, chosen: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        text = self.t5(pool.t5_ids[chosen])[0]
        return (text, self.clip(pool.clip_ids[chosen]).pooler_output), pool.roles[chosen]

    def velocity(self, mixed: Tensor, time: Tensor, *conditions: Tensor) -> Tensor:
        text, pooled = conditions
        side = int(mixed.shape[1] ** 0.5)
        return self.transformer(
            hidden_states=mixed,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=time,
            img_ids=FluxPipeline._prepare_latent_image_ids(
                1, side, side, mixed.device, torch.float32
            ),
            txt_ids=torch.zeros(T5_LENGTH, 3, device=mixed.device),
            return_dict=False,
        )[0]

    def pack(self, latents: Tensor) -> Tensor:
        """FluxPipeline's packing: tokens [B, T, 16]."""
        return FluxPipeline._pack_latents(latents, *latents.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class PixArtDenoiser(Denoiser):
    """tiny-pixart: cross-attention to T5's states; some captions are dropped for guidance."""

    transformer: PixArtTransformer2DModel
    t5: T5EncoderModel
    dropout: float  # the probability with which the empty caption takes a caption's place

    def modules(self) -> tuple[nn.Module, ...]:
        return self.transformer, self.t5

    def encode(self, pool: Pool, chosen: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        ids, roles = pool.t5_ids[chosen], pool.roles[chosen]
        pad, end = self.t5.config.pad_token_id, self.t5.config.eos_token_id
        empty = torch.full_like(ids[:1], pad)  # what the tokenizer makes of ""
        empty[:, 0] = end
        dropped = torch.rand(len(ids), 1, device=ids.device) < self.dropout
        ids, roles = torch.where(dropped, empty, ids), roles.masked_fill(dropped, NO_ROLE)
        mask = (ids != pad).long()
        return (self.t5(ids, attention_mask=mask)[0], mask), roles

    def velocity(self, mixed: Tensor, time: Tensor, *conditions: Tensor) -> Tensor:
        text, mask = conditions
        return self.transformer(
            mixed,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            # The pipeline's scheduler hands out whole numbers, rounded down.
            timestep=(tiny_pixart.TIMESTEPS * time).long(),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
