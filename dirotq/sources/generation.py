"""One call of a pipeline for a batch of prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dirotq.errors import ConfigError, NumericalError

from .prompt_files import open_picture
from .prompts import Prompt


def generate(
    pipe: Any, prompts: Sequence[Prompt], call: Mapping[str, float | int], *, output: str = "pt"
) -> Tensor:
    """Call the pipeline once for a batch of prompts, each from the noise of its own seed.

    returns  float32 on the CPU: images [B, 3, H, W] or videos [B, F, 3, H, W] in [0, 1]
             (``output="pt"``), or latents

    Raises NumericalError if an image is not finite.
    """
    made = pipe(
        prompt=[p.text for p in prompts],
        **_images(prompts),
        # On the CPU, so that a seed means the same noise on every machine.
        generator=[torch.Generator("cpu").manual_seed(p.seed) for p in prompts],
        output_type=output,
        **call,
    )
    result: Tensor = (made.images if hasattr(made, "images") else made.frames).float().cpu()
    if not result.isfinite().all():
        raise NumericalError(
            f"the pipeline produced a non-finite image for one of {[p.text for p in prompts]}; "
            "the model itself overflows in this precision, or its weights are damaged"
        )
    return result


def _images(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """Read from disk what editing pipelines take beside prompts ("image", "mask_image")."""
    names = sorted({name for prompt in prompts for name in prompt.inputs})
    for prompt in prompts:
        if missing := [name for name in names if name not in prompt.inputs]:
            raise ConfigError(
                f"the prompt {prompt.text!r} has no {missing[0]}, others of its batch have one: "
                "give every row of the prompt file the same columns"
            )
    return {n: [open_picture(p.inputs[n]) for p in prompts] for n in names}
