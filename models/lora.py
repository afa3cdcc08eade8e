"""LoRA files: read, held against a transformer, and added to its weights.

Letters: K channels in, N out, R rank. A module's weight becomes W + weight * (alpha / R) * B A.
"""

import inspect
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dirotq.digest import input_digests
from dirotq.errors import ConfigError, NumericalError, UnsupportedError
from dirotq.loading import check_weights
from dirotq.prompts import resolve

from .origin import PICKLES, read_json

METADATA = "lora_adapter_metadata"  # where diffusers notes alphas, in the header of the file
SETTINGS = "adapter_config.json"  # where peft notes them, beside the file
TEXT = ("text_encoder", "lora_te", "te.", "te1.", "te2.")
OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
}
_PART = re.compile(
    r"(?:base_model\.model\.)?(?:transformer\.)?(?P<module>.+?)\."
    r"(?:lora_(?P<peft>[AB])(?:\.\w+)?|lora[._](?P<old>down|up))\.weight"
)
_ALPHA = re.compile(r"(?:base_model\.model\.)?(?:transformer\.)?(?P<module>.+?)(?:\.lora)?\.alpha")


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file, and how strongly it is applied."""

    path: str
    weight: float = 1.0

    @property
    def file(self) -> Path:
        """The checked safetensors file. Raises ConfigError or ArtifactError."""
        path = resolve(self.path)
        if path.is_dir():
            files = sorted(path.glob("*.safetensors"))
            if len(files) != 1:
                raise ConfigError(
                    f"model.lora={self.path}: a folder of a LoRA holds one .safetensors file, this "
                    f"one {len(files)}; name the file itself"
                )
            path = files[0]
        if not path.is_file():
            raise ConfigError(
                f"model.lora={self.path}: there is no such file; download it and give its path"
            )
        if path.suffix != ".safetensors":
            why = ": a pickle can run code when loaded" if path.suffix in PICKLES else ""
            raise ConfigError(
                f"model.lora={self.path}: LoRAs are read from .safetensors files only{why}. "
                "Convert it where you trust it, with safetensors.torch.save_file"
            )
        check_weights(path)
        return path

    def identity(self) -> dict[str, Any]:
        """Its bytes, the alphas noted beside it, and its strength."""
        file = self.file
        beside = file.parent / SETTINGS
        files = [file, *([beside] if beside.is_file() else [])]
        return {"files": list(input_digests(files).values()), "weight": self.weight}


@dataclass(frozen=True, slots=True)
class Update:
    """What one LoRA adds to one module: scale * up @ down, [N, R] and [R, K] (or 1x1 kernels)."""

    down: Tensor
    up: Tensor
    scale: float


def parse_loras(given: Any) -> tuple[Lora, ...]:
    """``model.lora``: nothing, a path, or a list of paths and {path, weight}.

    Raises ConfigError for anything else.
    """
    entries = list(given or ()) if given is None or isinstance(given, list | tuple) else [given]
    found = []
    for entry in entries:
        match entry:
            case str(path):
                found.append(Lora(path))
            case {"path": str(path), "weight": int() | float() as weight, **rest} if not rest:
                found.append(Lora(path, float(weight)))
            case {"path": str(path), **rest} if not rest:
                found.append(Lora(path))
            case _:
                raise ConfigError(
                    f"model.lora: {entry!r} is no LoRA; write model.lora=FILE, or "
                    "model.lora=[{path: FILE, weight: 0.8}]"
                )
    return tuple(found)


def read_lora(
    lora: Lora, shapes: Mapping[str, tuple[int, ...]], pipeline: str
) -> dict[str, Update]:
    """{module: update} of a LoRA for the transformer whose tensors have ``shapes``.

    pipeline  class of diffusers that converts files of other programs (kohya, XLabs, ...)

    Raises UnsupportedError for text encoders and for kinds that are no low-rank sums; ConfigError
    naming the first parts that fit no module.
    """
    file = lora.file
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        noted = _noted_alphas(file, opened.metadata() or {})
    _refuse_other_kinds(lora, tensors)
    parts = _parts(tensors)
    if parts is None or any(f"{module}.weight" not in shapes for module in parts):
        converted = _converted(lora, tensors, pipeline)
        _refuse_text(lora, converted)
        parts, noted = (_parts(converted) if converted else None) or parts, {}
    if not parts:
        raise ConfigError(
            f"model.lora={lora.path} is no LoRA that is understood: among its {len(tensors)} "
            f"tensors are {sorted(tensors)[:3]}, expected are pairs such as "
            "transformer.<module>.lora_A.weight and .lora_B.weight, or a layout that diffusers "
            f"converts for {pipeline}"
        )
    updates = {module: _update(part, noted, module) for module, part in parts.items()}
    _refuse_misfits(lora, parts, updates, shapes)
    return {module: update for module, update in updates.items() if update is not None}


def add(weight: Tensor, updates: Iterable[tuple[float, Update]], name: str) -> Tensor:
    """``weight`` plus every (weight, update), summed in float32, rounded once to its own dtype.

    Raises NumericalError naming the module if the sum is not finite.
    """
    total = weight.to(torch.float32, copy=True)
    for factor, update in updates:
        down, up = (t.float().flatten(1) for t in (update.down, update.up))
        change = up @ down
        change *= factor * update.scale
        total += change.view_as(total)
    result = total.to(weight.dtype)
    if not bool(result.isfinite().all()):
        raise NumericalError(
            f"{name}: the weights with the LoRA added are not finite in {weight.dtype}; the LoRA "
            "or the model is damaged, or model.lora's weight is far too large"
        )
    return result


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]] | None:
    """{module: {down, up, alpha}}, or None if a tensor is neither."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if match := _PART.fullmatch(key):
            side = {"A": "down", "B": "up"}.get(match["peft"], match["old"])
            found.setdefault(match["module"], {})[side] = tensor
        elif match := _ALPHA.fullmatch(key):
            found.setdefault(match["module"], {})["alpha"] = tensor
        else:
            return None
    return found


def _converted(lora: Lora, tensors: Mapping[str, Tensor], pipeline: str) -> dict[str, Tensor]:
    """The same in diffusers' layout, by the pipeline's own converters; empty if they can't.

    Raises ConfigError if a converter leaves tensors out, which diffusers only warns of.
    """
    import diffusers

    convert = getattr(getattr(diffusers, pipeline, None), "lora_state_dict", None)
    if convert is None:
        return {}
    alphas = "return_alphas" in inspect.signature(convert).parameters
    try:
        with _warnings() as said:
            made = convert(dict(tensors), **({"return_alphas": True} if alphas else {}))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return {}  # it was not written for such keys; the caller names them
    if said:
        raise ConfigError(
            f"model.lora={lora.path} is not understood as a whole by diffusers' converter for "
            f"{pipeline}: {said[0][:300]}. Fuse it with the program that trained it and compress "
            "the fused model, or save a copy without these tensors"
        )
    state, found = made if isinstance(made, tuple) else (made, None)
    return {**state, **{key: torch.as_tensor(value) for key, value in (found or {}).items()}}


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What diffusers' LoRA converters warn of, instead of on the screen."""
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


def _update(part: Mapping[str, Tensor], noted: Mapping[str, Any], module: str) -> Update | None:
    """None if a half is missing or the halves don't belong together."""
    if not {"down", "up"} <= part.keys():
        return None
    down, up = part["down"], part["up"]
    if min(down.ndim, up.ndim) < 2 or up.flatten(1).shape[1] != len(down):
        return None
    rank = len(down)
    if "alpha" in part:
        return Update(down, up, float(part["alpha"]) / rank)
    patterns = noted.get("alpha_pattern") or {}
    alpha = next(
        (a for p, a in patterns.items() if module == p or module.endswith(f".{p}")),
        noted.get("lora_alpha"),
    )
    if alpha is None:
        return Update(down, up, 1.0)
    return Update(down, up, float(alpha) / (rank**0.5 if noted.get("use_rslora") else rank))


def _noted_alphas(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings: in the file's header (diffusers), or beside it (peft)."""
    if METADATA in metadata:
        settings = json.loads(metadata[METADATA])
        return {k.removeprefix("transformer."): v for k, v in settings.items()}
    beside = file.parent / SETTINGS
    return read_json(beside) if beside.is_file() else {}


def _refuse_other_kinds(lora: Lora, tensors: Mapping[str, Tensor]) -> None:
    for key in tensors:
        for mark, kind in OTHER_KINDS.items():
            if mark in key:
                raise UnsupportedError(
                    f"model.lora={lora.path} is a {kind} ({key}), not a LoRA: it is no plain sum "
                    "of low-rank updates. Fuse it with the program that trained it and compress "
                    "the fused model"
                )
    _refuse_text(lora, tensors)


def _refuse_text(lora: Lora, keys: Iterable[str]) -> None:
    if text := [key for key in keys if key.startswith(TEXT)]:
        raise UnsupportedError(
            f"model.lora={lora.path} also changes text encoders ({len(text)} tensors, such as "
            f"{text[0]}), which DiRotQ leaves as they are: the images would not be the LoRA's. "
            "Save a copy without these tensors if the transformer's part is what you want"
        )


def _refuse_misfits(
    lora: Lora,
    parts: Mapping[str, Mapping[str, Tensor]],
    updates: Mapping[str, Update | None],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Refuse a LoRA for another model, naming its first parts that fit nowhere."""
    misfits = []
    for module, update in updates.items():
        shape = shapes.get(f"{module}.weight")
        if shape is None:
            misfits.append(f"{module} (no such module)")
        elif update is None:
            found = {side: tuple(tensor.shape) for side, tensor in parts[module].items()}
            misfits.append(f"{module} (its halves don't make a pair: {found})")
        else:
            inner = update.down[0].numel()
            if (len(update.up), inner) != (shape[0], torch.Size(shape[1:]).numel()):
                misfits.append(f"{module} (changes [{len(update.up)}, {inner}], is {list(shape)})")
    if misfits:
        raise ConfigError(
            f"model.lora={lora.path} is a LoRA for another model: {len(misfits)} of its "
            f"{len(parts)} parts do not fit this transformer, first {'; '.join(misfits[:3])}. Give "
            "the model that it was trained on"
        )
