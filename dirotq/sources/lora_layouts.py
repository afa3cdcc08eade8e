"""The pairs in a LoRA file: diffusers' and peft's names, or those that diffusers converts.

A converter of diffusers gets every pair with its alpha worked in already, and has to use every
tensor: converters pass over alphas, and over tensors of another layout, without a word.
"""

import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dirotq.errors import ConfigError

from .traced import left_out, plain, traced

_PART = re.compile(
    r"(?P<peft_model>base_model\.model\.)?(?P<root>transformer\.)?(?P<module>.+?)\."
    r"(?:lora_(?P<peft>[AB])(?:\.(?P<adapter>[\w-]+))?|lora[._](?P<old>down|up))\.weight"
)
_ALPHA = re.compile(r"(?:base_model\.model\.)?(?:transformer\.)?(?P<module>.+?)(?:\.lora)?\.alpha")
_FAR = re.compile(r"\d{5}")


@dataclass(frozen=True, slots=True)
class Half:
    """One matrix of a pair."""

    key: str
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Pair:
    """What a file holds of one module: ``down`` [R, K], ``up`` [N, R], or only one of them.

    trained_as  the module's name where it was trained, which peft's patterns speak of
    """

    trained_as: str
    down: Half | None = None
    up: Half | None = None
    alpha: Half | None = None

    @property
    def rank(self) -> int:
        """R, or 0 if there is none."""
        return self.down.tensor.shape[0] if self.down and self.down.tensor.ndim else 0

    @property
    def halves(self) -> Iterator[Half]:
        return (half for half in (self.down, self.up, self.alpha) if half is not None)


def pairs_in(tensors: Mapping[str, Tensor], name: str) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """Return {module: pair}, and the tensors that belong to none.

    Raises ConfigError if two tensors claim the same place.
    """
    found: dict[str, Pair] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if match := _PART.fullmatch(key):
            side = {"A": "down", "B": "up"}.get(match["peft"], match["old"])
            module = match["module"]
            pair = found.get(module, Pair((match["root"] or "") + module))
            if not match["peft_model"]:
                pair = replace(pair, trained_as=module)
        elif match := _ALPHA.fullmatch(key):
            side, module = "alpha", match["module"]
            pair = found.get(module, Pair(module))
        else:
            rest[key] = tensor
            continue
        if (other := getattr(pair, side)) is not None:
            raise ConfigError(
                f"{name} holds two tensors for one place, {other.key} and {key} (two adapters, or "
                "two layouts, in one file); save a copy with only one of them"
            )
        filled: dict[str, Any] = {side: Half(key, tensor)}
        found[module] = replace(pair, **filled)
    return found, rest


def converted(
    pairs: Mapping[str, Pair],
    scales: Mapping[str, float],
    rest: Mapping[str, Tensor],
    pipeline: str,
    name: str,
) -> tuple[dict[str, Tensor], str]:
    """Convert to diffusers' names, with all alphas worked in, by the pipeline's own converter.

    scales   by module, worked into ``up`` in float32
    returns  the tensors, or none and why there are none

    Raises ConfigError if the converter leaves tensors out.
    """
    import diffusers

    convert = getattr(getattr(diffusers, pipeline, None), "lora_state_dict", None)
    if convert is None:
        return {}, f"diffusers converts no LoRA for {pipeline}"
    given = dict(rest)
    neutral = {}
    for module, pair in pairs.items():
        for half in pair.halves:
            given[half.key] = half.tensor
        if pair.up is not None and scales[module] != 1:
            given[pair.up.key] = pair.up.tensor.float() * scales[module]
        if pair.alpha is not None and pair.rank:  # converters ask for it
            neutral[pair.alpha.key] = torch.tensor(float(pair.rank))
    if far := next((key for key in given if _FAR.search(key)), None):
        return {}, f"no model has as many blocks as {far} says"  # a converter would count so far
    marked = traced({key: tensor for key, tensor in given.items() if key not in neutral})
    alphas = "return_alphas" in inspect.signature(convert).parameters
    try:
        with _warnings() as said:
            made = convert(marked | neutral, **({"return_alphas": True} if alphas else {}))
        state = made[0] if isinstance(made, tuple) else made
        lost = [key for key in left_out(marked, state) if bool(given[key].count_nonzero())]
    except Exception as error:  # noqa: BLE001 - it was not written for such keys: the finding
        return {}, f"diffusers' converter for {pipeline}: {type(error).__name__} {error!s:.120}"
    if said or lost:
        what = said[0][:300] if said else f"it passes over {len(lost)} tensors, such as {lost[:3]}"
        raise ConfigError(
            f"{name} is not understood as a whole by diffusers' converter for {pipeline}: {what}. "
            "Fuse it with the program that trained it and compress the fused model, or save a copy "
            "without these tensors"
        )
    return plain({key: t for key, t in state.items() if key not in neutral}), ""


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what diffusers' LoRA converters warn of, instead of on the screen."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [
        logging.getLogger(f"diffusers.loaders.{name}")
        for name in ("lora_conversion_utils", "lora_pipeline", "lora_base")
    ]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    try:
        yield said
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
