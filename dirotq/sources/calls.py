"""What the call of a diffusers pipeline takes, held against what somebody wants to give it."""

import inspect
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from dirotq.errors import ConfigError
from dirotq.models.pipeline_images import (
    PICTURES,
    pictures_needed,
    pictures_taken,
    takes_several,
)
from dirotq.pipeline.settings import close_to, refuse_misfit
from dirotq.sources.prompt_files import NEGATIVE
from dirotq.sources.prompts import Prompt

SCALE = "true_cfg_scale"
"""Of guidance by a negative prompt, in pipelines whose guidance_scale is an input."""
BOUNDARY, SECOND_SCALE = "boundary_ratio", "guidance_scale_2"
"""What divides the steps between two experts, and the guidance of the second, of low noise."""
OURS = ("prompt", "generator", "output_type", "return_dict", "latents", *PICTURES)
"""Arguments that DiRotQ gives itself, from prompts and seeds."""
PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt")
"""Arguments that are 1: a prompt has one seed, and what it makes is compared one by one."""
NATURAL = ("num_inference_steps", "height", "width", "num_frames", "max_sequence_length")
"""Arguments that count something: 1 or more."""


def pipeline_class(index: Mapping[str, Any]) -> Any:
    """Return the class of diffusers that a model_index.json names; None if it names none."""
    import diffusers

    from dirotq.quiet import quiet

    with quiet():
        return getattr(diffusers, str(index.get("_class_name")), None)


def arguments(cls: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a pipeline's call, by name."""
    return inspect.signature(cls.__call__).parameters


def refuse_prompts(
    cls: Any, prompts: Sequence[Prompt], where: str, call: Mapping[str, Any]
) -> None:
    """Raise ConfigError for prompts that lack a picture that the pipeline needs, or hold what it
    does not take: a picture, several of them, a negative prompt.

    call  its other arguments; with a ``true_cfg_scale`` of 1 negative prompts are not looked at
    """
    name, taken = cls.__name__, pictures_taken(cls)
    for needed in pictures_needed(cls):
        if lacking := [prompt.text for prompt in prompts if needed not in prompt.inputs]:
            row = {"prompt": "make it snow"} | {column: f"{column}.png" for column in taken}
            raise ConfigError(
                f"a {name} starts from a picture, and {len(lacking)} of {len(prompts)} prompts of "
                f"{where} have no {needed}, such as {lacking[0]!r:.60}. Give a .jsonl file whose "
                f"rows are like {json.dumps(row)}, with paths from the file's folder, as "
                "prompts.calibration.path=FILE and prompts.heldout.path=FILE"
            )
    for prompt in prompts:
        if odd := sorted(prompt.inputs.keys() - set(taken)):
            raise ConfigError(
                f"{where}: the prompt {prompt.text!r:.60} has a column {odd[0]}, and a {name} "
                "starts from none; remove that column, or choose the model's editing pipeline"
            )
        listed = sorted(n for n, given in prompt.inputs.items() if not isinstance(given, str))
        if listed and not (listed == ["image"] and takes_several(cls)):
            raise ConfigError(
                f"{where}: the prompt {prompt.text!r:.60} has a list of pictures as {listed[0]}, "
                f"and a {name} takes one; give one path"
            )
        if prompt.negative is not None and NEGATIVE not in arguments(cls):
            raise ConfigError(
                f"{where}: the prompt {prompt.text!r:.60} has a {NEGATIVE}, and a {name} takes "
                "none; remove that column"
            )
    if negative := [prompt.text for prompt in prompts if prompt.negative is not None]:
        refuse_unread(cls, call, f"{where}: the prompt {negative[0]!r:.60} has a {NEGATIVE}")


def refuse_unread(cls: Any, call: Mapping[str, Any], said: str, where: str = "model.call") -> None:
    """Raise ConfigError where a pipeline would pass over a negative prompt.

    call  all other arguments; ``said`` begins the message, ``where`` a scale may be set
    """
    if (scale := arguments(cls).get(SCALE)) is None:
        return
    if (found := call.get(SCALE, scale.default)) is None or found <= 1:
        raise ConfigError(
            f"{said}, which a {cls.__name__} reads only with a {SCALE} above 1, and it is {found}: "
            f"set +{where}.{SCALE}=4, or leave the {NEGATIVE} out"
        )


def refuse_second(cls: Any, index: Mapping[str, Any], call: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for the guidance of a second expert in a pipeline that has one expert.

    call  all arguments, some of which were set in ``where``
    """
    if BOUNDARY not in inspect.signature(cls.__init__).parameters:
        return
    if (found := call.get(SECOND_SCALE)) is not None and index.get(BOUNDARY) is None:
        raise ConfigError(
            f"{SECOND_SCALE}={found} is the guidance of a second expert, and this {cls.__name__} "
            f"has none: its model_index.json names no {BOUNDARY}. Leave it out "
            f"(++{where}.{SECOND_SCALE}=null, or take it out of generation.json)"
        )


def refuse_mixed(prompts: Sequence[Prompt], where: str) -> None:
    """Raise ConfigError for prompts of one call, some of which have a column that others lack."""
    columns = [
        {*prompt.inputs, *([] if prompt.negative is None else [NEGATIVE])} for prompt in prompts
    ]
    for prompt, given in zip(prompts, columns, strict=True):
        if missing := sorted(set().union(*columns) - given):
            raise ConfigError(
                f"{where}: the prompt {prompt.text!r:.60} has no {missing[0]}, others of its call "
                'have one: give every row the same columns (an empty negative prompt is ""), or '
                "one prompt to a call (capture.batch=1, reference.batch=1 and validate.batch=1)"
            )


def refuse_call(cls: Any, call: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for an argument in ``where`` that the pipeline does not take like that."""
    known = arguments(cls)
    free = any(p.kind is p.VAR_KEYWORD for p in known.values())
    try:
        hints = typing.get_type_hints(cls.__call__)
    except (NameError, TypeError):  # annotated with what is imported for type checkers alone
        hints = {}
    for name, value in call.items():
        if name in OURS:
            raise ConfigError(
                f"{where}.{name}: DiRotQ gives {name} itself, from the prompts and their seeds; "
                "leave it out"
            )
        if name not in known and not free:
            names = sorted(known.keys() - {"self", *OURS})
            raise ConfigError(
                f"{where}.{name}: {cls.__name__} takes no such argument;{close_to(name, names)} it "
                f"takes {', '.join(names)}"
            )
        if value is None:
            continue
        if name in PER_PROMPT and value != 1:
            raise ConfigError(
                f"{where}.{name}={value!r}: DiRotQ makes one of each prompt; leave it out, and "
                "give more prompts"
            )
        if name in NATURAL and (type(value) is not int or value < 1):
            raise ConfigError(f"{where}.{name}={value!r}: use a whole number from 1 on")
        if isinstance(value, bool | int | float | str):
            refuse_misfit(value, hints.get(name, Any), f"{where}.{name}")
