"""Random inputs of one forward at full size; the same for every contestant of a case.

They are what a pipeline hands over for one prompt that fills its text.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TEXT = {
    "flux": 512, "pixart_sigma": 300, "sana": 300, "sd3": 77 + 256, "z_image": 256,
    "flux2_klein": 512, "qwen_image": 512, "wan": 512,
}  # fmt: skip
"""Text tokens."""
FRAMES = 81
"""Of a video: 21 latent ones."""
Draw = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """A model of full size, ``side`` x ``side`` pixels, ``batch`` images.

    A video is ``side`` pixels high and 26/15 as wide. ``blocks``: only so many; None: all.
    """

    model: str
    side: int
    batch: int = 1
    blocks: int | None = None

    def __str__(self) -> str:
        few = "" if self.blocks is None else f", {self.blocks} blocks"
        if self.model == "wan":
            return f"wan {self.width}x{self.side}x{FRAMES}{few}"
        return f"{self.model} {self.side}x{self.batch}{few}"

    @property
    def network(self) -> tuple[str, int | None]:
        """What all sizes share."""
        return self.model, self.blocks

    @property
    def width(self) -> int:
        """Pixels; whole patches."""
        return self.side * 26 // 15 // 16 * 16 if self.model == "wan" else self.side

    @property
    def changes(self) -> dict[str, int]:
        """Fields of the transformer's config that differ from the published ones."""
        return {} if self.blocks is None else {"num_layers": self.blocks}


def inputs(case: Case, config: Any, device: str = "cuda") -> dict[str, Any]:
    """Return keyword arguments of the transformer's forward, from a seed of their own.

    config  the transformer's, which says how wide text and latents are
    """
    generator = torch.Generator(device).manual_seed(case.side + case.batch)

    def draw(*shape: int) -> Tensor:
        made = torch.randn(*shape, generator=generator, device=device)
        return made.to(torch.bfloat16)

    given = _MAKERS[case.model](case, config, draw)
    return _moved(given, torch.device(device)) | {"return_dict": False}


def _moved(given: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in given.items()
    }


def _flux(case: Case, config: Any, draw: Draw) -> dict[str, Any]:
    b, text, grid = case.batch, TEXT[case.model], case.side // 16
    guided = {"guidance": torch.full((b,), 3.5)} if config.guidance_embeds else {}
    return {
        "hidden_states": draw(b, grid * grid, config.in_channels),
        "encoder_hidden_states": draw(b, text, config.joint_attention_dim),
        "pooled_projections": draw(b, config.pooled_projection_dim),
        "timestep": torch.full((b,), 0.5, dtype=torch.bfloat16),
        "img_ids": torch.cartesian_prod(torch.zeros(1), *[torch.arange(grid).float()] * 2),
        "txt_ids": torch.zeros(text, 3),
        **guided,
    }


def _flux2(case: Case, config: Any, draw: Draw) -> dict[str, Any]:
    b, text, grid = case.batch, TEXT[case.model], case.side // 16
    zero, line = torch.zeros(1), torch.arange(grid).float()
    return {
        "hidden_states": draw(b, grid * grid, config.in_channels),
        "encoder_hidden_states": draw(b, text, config.joint_attention_dim),
        "timestep": torch.full((b,), 0.5, dtype=torch.bfloat16),
        "img_ids": torch.cartesian_prod(zero, line, line, zero).expand(b, -1, -1),
        "txt_ids": torch.cartesian_prod(
            zero, zero, zero, torch.arange(text).float()
        ).expand(b, -1, -1),
    }  # fmt: skip


def _pixart(case: Case, config: Any, draw: Draw) -> dict[str, Any]:
    sizes = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return _cross(case, config, draw, 8) | sizes


def _sana(case: Case, config: Any, draw: Draw) -> dict[str, Any]:
    return _cross(case, config, draw, 32)


def _cross(case: Case, config: Any, draw: Draw, factor: int) -> dict[str, Any]:
    """Read the text by cross-attention; one latent for ``factor`` x ``factor`` pixels."""
    b, text, latent = case.batch, TEXT[case.model], case.side // factor
    return {
        "hidden_states": draw(b, config.in_channels, latent, latent),
        "encoder_hidden_states": draw(b, text, config.caption_channels),
        "encoder_attention_mask": torch.ones(b, text, dtype=torch.bfloat16),
        "timestep": torch.full((b,), 500.0, dtype=torch.bfloat16),
    }


def _sd3(case: Case, config: Any, draw: Draw) -> dict[str, Any]:
    b, latent = case.batch, case.side // 8
    return {
        "hidden_states": draw(b, config.in_channels, latent, latent),
        "encoder_hidden_states": draw(b, TEXT[case.model], config.joint_attention_dim),
        "pooled_projections": draw(b, config.pooled_projection_dim),
        "timestep": torch.full((b,), 500.0),
    }


def _z_image(case: Case, config: Any, draw: Draw) -> dict[str, Any]:
    b, latent = case.batch, case.side // 8
    return {
        "x": [draw(config.in_channels, 1, latent, latent) for _ in range(b)],
        "t": torch.full((b,), 0.5, dtype=torch.bfloat16),
        "cap_feats": [draw(TEXT[case.model], config.cap_feat_dim) for _ in range(b)],
    }


def _qwen_image(case: Case, config: Any, draw: Draw) -> dict[str, Any]:
    """Give no mask: the pipeline drops one that masks nothing."""
    b, grid = case.batch, case.side // 16
    return {
        "hidden_states": draw(b, grid * grid, config.in_channels),
        "encoder_hidden_states": draw(b, TEXT[case.model], config.joint_attention_dim),
        "timestep": torch.full((b,), 0.5, dtype=torch.bfloat16),
        "img_shapes": [[(1, grid, grid)]] * b,
    }


def _wan(case: Case, config: Any, draw: Draw) -> dict[str, Any]:
    b, frames = case.batch, (FRAMES - 1) // 4 + 1
    return {
        "hidden_states": draw(b, config.in_channels, frames, case.side // 8, case.width // 8),
        "encoder_hidden_states": draw(b, TEXT[case.model], config.text_dim),
        "timestep": torch.full((b,), 500.0),
    }


_MAKERS: Mapping[str, Callable[[Case, Any, Draw], dict[str, Any]]] = {
    "flux": _flux,
    "pixart_sigma": _pixart,
    "sana": _sana,
    "sd3": _sd3,
    "z_image": _z_image,
    "flux2_klein": _flux2,
    "qwen_image": _qwen_image,
    "wan": _wan,
}
