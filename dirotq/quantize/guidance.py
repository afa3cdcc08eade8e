"""Guidance: how many forwards a step makes of one prompt, and whether one call has them all."""

from collections.abc import Mapping
from typing import Any

SEPARATE = (
    "Flux2Transformer2DModel", "Krea2Transformer2DModel", "QwenImageTransformer2DModel",
    "WanTransformer3DModel",
)  # fmt: skip
"""Transformers that their pipelines call once per branch of guidance, not on a doubled batch."""
FROM_ZERO = ("Krea2Transformer2DModel", "ZImageTransformer2DModel")
"""Transformers whose pipelines guide with any scale above 0; others do with one above 1."""


def branches(call: Mapping[str, Any], transformer: str, embedded: bool) -> int:
    """Return the forwards of a step: two where guidance needs the prompt's and an empty one's.

    call         arguments of the pipeline
    transformer  its class
    embedded     whether that takes the scale of guidance as an input (guidance_embeds)
    """
    if "true_cfg_scale" in call:
        return 2 if _true(call) else 1
    least = 0 if transformer in FROM_ZERO else 1
    return 2 if call.get("guidance_scale", 0) > least and not embedded else 1


def samples(call: Mapping[str, Any], transformer: str, embedded: bool) -> int:
    """Return the samples of one prompt in one call: two where both branches are one batch.

    Arguments are those of :func:`branches`.
    """
    separate = _true(call) or transformer in SEPARATE
    return 1 if separate else branches(call, transformer, embedded)


def _true(call: Mapping[str, Any]) -> bool:
    """Tell whether a negative prompt guides, which takes a call of its own."""
    return "negative_prompt" in call and call.get("true_cfg_scale", 0) > 1
