"""One call of a pipeline for a batch of prompts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dirotq.errors import ConfigError, NumericalError, UnsupportedError
from dirotq.models.pipeline_images import PICTURES, as_taken, takes_batches
from dirotq.pipeline.faults import BROKEN_GPU, OUT_OF_MEMORY

from .prompt_files import NEGATIVE, open_picture
from .prompts import Prompt
from .sound import sound_of

STUMBLES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
"""What pipelines raise for settings that don't fit each other."""


@contextmanager
def foreign(pipeline: str, more: str = "") -> Iterator[None]:
    """Explain what a 16-bit pipeline raises while it is called; no line of it is ours.

    pipeline  the name of its class;  more: what else to say

    Memory that ran out and a GPU that failed stay what they are (pipeline/faults.py).
    """
    try:
        yield
    except STUMBLES as error:
        if OUT_OF_MEMORY.search(str(error)) or BROKEN_GPU.search(str(error)):
            raise
        raise UnsupportedError(
            f"the 16-bit {pipeline} fails when it is called ({type(error).__name__}: "
            f"{error!s:.300}): a setting in a component's config.json or an argument of the call "
            "(generation.json, model.call, model.sample) does not fit its weights. Try the folder "
            f"with diffusers alone; if that makes an image, please report this{more}"
        ) from error


def generate(
    pipe: Any, prompts: Sequence[Prompt], call: Mapping[str, Any], *, output: str = "pt"
) -> Tensor:
    """Return the images of :func:`generate_with_sound` alone."""
    return generate_with_sound(pipe, prompts, call, output=output)[0]


def generate_with_sound(
    pipe: Any, prompts: Sequence[Prompt], call: Mapping[str, Any], *, output: str = "pt"
) -> tuple[Tensor, Tensor | None]:
    """Call the pipeline once for a batch of prompts, each from the noise of its own seed.

    returns  float32 on the CPU: images [B, 3, H, W] or videos [B, F, 3, H, W] in [0, 1]
             (``output="pt"``), on white where a pipeline makes them transparent; or latents.
             With them the sound, [B, channels, samples] in [-1, 1], or its latents; None where the
             pipeline makes none

    Where a list of pictures is one prompt's references (models/pipeline_images.py), it is called
    once for each prompt.

    Raises NumericalError if an image or a sound is not finite.
    """
    given = _inputs(prompts)
    if given.keys() & set(PICTURES) and not takes_batches(type(pipe)):
        if len(prompts) > 1:
            each = [generate_with_sound(pipe, [one], call, output=output) for one in prompts]
            sounds = [sound for _, sound in each if sound is not None]
            return torch.cat([images for images, _ in each]), torch.cat(sounds) if sounds else None
        given |= {n: as_taken(type(pipe), given[n][0]) for n in PICTURES if n in given}
    made = pipe(
        prompt=[p.text for p in prompts],
        # On the CPU, so that a seed means the same noise on every machine.
        generator=[torch.Generator("cpu").manual_seed(p.seed) for p in prompts],
        output_type=output,
        **{**call, **given},
    )
    result: Tensor = (made.images if hasattr(made, "images") else made.frames).float().cpu()
    sound = sound_of(made)
    for what, found in (("image", result), ("sound", sound)):
        if found is not None and not found.isfinite().all():
            raise NumericalError(
                f"the pipeline produced a non-finite {what} for one of "
                f"{[p.text for p in prompts]}; the model itself overflows in this precision, or "
                "its weights are damaged"
            )
    return _on_white(result) if output == "pt" else result, sound


def _on_white(images: Tensor) -> Tensor:
    """Lay images [..., 4, H, W], whose last channel is how opaque they are, on white."""
    if images.shape[-3] != 4:
        return images
    colours, opaque = images[..., :3, :, :], images[..., 3:, :, :]
    return (colours * opaque + (1 - opaque)).clamp(0, 1)


def _inputs(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return what a pipeline takes beside prompts: negative ones, and pictures read from disk."""
    known = [
        {**p.inputs, **({} if p.negative is None else {NEGATIVE: p.negative})} for p in prompts
    ]
    names = sorted({name for one in known for name in one})
    for prompt, one in zip(prompts, known, strict=True):
        if missing := [name for name in names if name not in one]:
            raise ConfigError(
                f"the prompt {prompt.text!r} has no {missing[0]}, others of its batch have one: "
                "give every row of the prompt file the same columns"
            )
    return {
        name: [_opened(one[name]) if name in PICTURES else one[name] for one in known]
        for name in names
    }


def _opened(given: str | tuple[str, ...]) -> Any:
    """Open a picture, or a list of one prompt's references."""
    if isinstance(given, str):
        return open_picture(given)
    return [open_picture(path) for path in given]
