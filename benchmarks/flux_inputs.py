"""Random inputs of one forward at full size; the same for every contestant of a case."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TEXT = {"flux": 512, "pixart_sigma": 300, "sana": 300}


@dataclass(frozen=True, slots=True)
class Case:
    """A model of full size, ``side`` x ``side`` pixels, ``batch`` images."""

    model: str
    side: int
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.model} {self.side}x{self.batch}"


def inputs(case: Case, config: Any, device: str = "cuda") -> dict[str, Any]:
    """Keyword arguments of the transformer's forward, from a seed of their own.

    config  the transformer's, which says how wide text and latents are
    """
    generator = torch.Generator(device).manual_seed(case.side + case.batch)

    def draw(*shape: int) -> Tensor:
        made = torch.randn(*shape, generator=generator, device=device)
        return made.to(torch.bfloat16)

    b, text = case.batch, TEXT[case.model]
    if case.model == "flux":
        grid = case.side // 16
        rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1)
        guided = {"guidance": torch.full((b,), 3.5, device=device)}
        return {
            "hidden_states": draw(b, grid * grid, config.in_channels),
            "encoder_hidden_states": draw(b, text, config.joint_attention_dim),
            "pooled_projections": draw(b, config.pooled_projection_dim),
            "timestep": torch.full((b,), 0.5, device=device, dtype=torch.bfloat16),
            "img_ids": places.reshape(-1, 3).to(device, torch.float32),
            "txt_ids": torch.zeros(text, 3, device=device),
            "return_dict": False,
            **(guided if config.guidance_embeds else {}),
        }
    latent = case.side // (32 if case.model == "sana" else 8)
    sizes = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return {
        "hidden_states": draw(b, config.in_channels, latent, latent),
        "encoder_hidden_states": draw(b, text, config.caption_channels),
        "encoder_attention_mask": torch.ones(b, text, device=device, dtype=torch.bfloat16),
        "timestep": torch.full((b,), 500.0, device=device, dtype=torch.bfloat16),
        "return_dict": False,
        **(sizes if case.model == "pixart_sigma" else {}),
    }
