"""LoRA files: read, held against a transformer, and added to its weights.

Letters: K channels in, N out, R rank. A module's weight becomes W + weight * (alpha / R) * B A.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dirotq.errors import ConfigError, NumericalError, UnsupportedError
from dirotq.files.digest import input_digests
from dirotq.sources.prompts import resolve, shortly

from .lora_files import FUSE, SETTINGS, Pair, Settings, converted, number, pairs_in, read_settings
from .origin import PICKLES
from .weights import open_weights, read_header

TEXT = ("text_encoder", "lora_te", "te.", "te1.", "te2.")
OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "vera_lambda": "VeRA",
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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
        read_header(path)
        return path

    def identity(self) -> dict[str, Any]:
        """Return its bytes, the settings noted beside it, and its strength."""
        file = self.file
        beside = file.parent / SETTINGS
        files = [file, *([beside] if beside.is_file() else [])]
        rules = {"rules": 2} if _other_before(file) else {}
        return {"files": list(input_digests(files).values()), "weight": self.weight} | rules


@dataclass(frozen=True, slots=True)
class Update:
    """What one LoRA adds to one module: scale * up @ down, [N, R] and [R, K] (or 1x1 kernels)."""

    down: Tensor
    up: Tensor
    scale: float


def parse_loras(given: Any) -> tuple[Lora, ...]:
    """Read ``model.lora``: nothing, a path, a list of paths and {path, weight}; or ConfigError."""
    entries = given if isinstance(given, list | tuple) else [] if given is None else [given]
    found = []
    for entry in entries:
        match entry:
            case str(path):
                found.append(Lora(path))
            case {"path": str(path), **rest} if not rest:
                found.append(Lora(path))
            case {"path": str(path), "weight": weight, **rest} if not rest and _strength(weight):
                found.append(Lora(path, float(weight)))
            case _:
                raise ConfigError(
                    f"model.lora: {shortly(entry)} is no LoRA; write model.lora=FILE, or "
                    "model.lora=[{path: FILE, weight: 0.8}]; a weight is a finite number"
                )
    return tuple(found)


def _strength(weight: Any) -> bool:
    # Not true for NaN.
    return type(weight) in (int, float) and abs(weight) <= torch.finfo(torch.float32).max


def read_lora(
    lora: Lora, shapes: Mapping[str, tuple[int, ...]], pipeline: str
) -> dict[str, Update]:
    """Return {module: update} of a LoRA for the transformer whose tensors have ``shapes``.

    pipeline  class of diffusers that converts files of other programs (kohya, XLabs, ...)

    Raises UnsupportedError for text encoders and for kinds that are no low-rank sums; ConfigError
    naming the first parts that fit no module, and whatever would not be added as peft adds it.
    """
    name = f"model.lora={lora.path}"
    file = lora.file
    settings = _settings(file)
    tensors = load_file(file)
    refuse_kinds(name, tensors)
    _refuse_text(name, tensors)
    pairs, rest = pairs_in(tensors, name)
    _refuse_odd_numbers(name, pairs)
    scales = {module: _scale(pair, settings, name) for module, pair in pairs.items()}
    foreign = {m: pair for m, pair in pairs.items() if f"{m}.weight" not in shapes}
    why = ""
    if foreign or rest:
        made, why = converted(foreign, scales, rest, pipeline, name)
        _refuse_text(name, made)
        named, others = pairs_in(made, name)
        rest = rest if why else others
        if named:
            own = {m: pair for m, pair in pairs.items() if m not in foreign}
            if twice := sorted(own.keys() & named.keys()):
                raise ConfigError(
                    f"{name} holds {twice[0]} under two names, of two layouts; save a copy with "
                    "only one of them"
                )
            pairs, scales = named | own, scales | dict.fromkeys(named, 1.0)
    because = f" ({why})" if why else ""
    if not pairs:
        raise ConfigError(
            f"{name} is no LoRA that is understood: among its {len(tensors)} tensors are "
            f"{sorted(tensors)[:3]}, expected are pairs such as transformer.<module>.lora_A.weight "
            f"and .lora_B.weight, or a layout that diffusers converts for {pipeline}{because}"
        )
    if rest:
        raise UnsupportedError(
            f"{name} holds more than pairs of matrices: {len(rest)} tensors, such as "
            f"{sorted(rest)[:3]}{because}. Without them the images would not be the LoRA's. {FUSE}"
        )
    refuse_misfits(name, pairs, shapes, because)
    found = {}
    for module, pair in pairs.items():
        assert pair.down and pair.up  # else a misfit
        found[module] = Update(pair.down.tensor, pair.up.tensor, scales[module])
        if not bool(pair.down.tensor.isfinite().all() & pair.up.tensor.isfinite().all()):
            raise NumericalError(
                f"{name}: its part for {module} holds NaN or infinity; the file is damaged, or its "
                "training diverged"
            )
    return found


def add(weight: Tensor, updates: Iterable[tuple[float, Update]], name: str) -> Tensor:
    """Add every (weight, update) to ``weight`` in float32, rounded once to its own dtype.

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


def _settings(file: Path) -> Settings:
    with open_weights(file) as opened:
        return read_settings(file, opened.metadata() or {})


def _other_before(file: Path) -> bool:
    """Tell whether the first rules added it otherwise: peft's patterns, last layer's alphas."""
    last = (key for key in read_header(file) if key.endswith(".alpha") and "final_layer" in key)
    return any(last) or _settings(file).patterns


def _scale(pair: Pair, settings: Settings, name: str) -> float:
    """Return alpha / rank, by the file's own tensor or peft's settings. Raises ConfigError."""
    if not pair.rank:
        return 1.0  # a misfit
    if pair.alpha is None:
        return settings.scale(pair.trained_as, pair.rank)
    alpha, key = pair.alpha.tensor, pair.alpha.key
    if alpha.numel() != 1 or alpha.is_complex():
        raise ConfigError(f"{name}: {key} is {alpha.dtype} {list(alpha.shape)}, not a number")
    scale = number(alpha.item(), f"{name}: {key}") / pair.rank
    noted = settings.scale(pair.trained_as, pair.rank)
    if settings.values and not math.isclose(noted, scale):
        raise ConfigError(
            f"{name} holds {key}, which scales by {scale}, and {settings.where} says {noted}; "
            "remove what does not belong to it"
        )
    return scale


def _refuse_odd_numbers(name: str, pairs: Mapping[str, Pair]) -> None:
    for pair in pairs.values():
        for half in (pair.down, pair.up):
            if half is not None and half.tensor.dtype not in FLOATS:
                raise UnsupportedError(
                    f"{name}: {half.key} is stored as {half.tensor.dtype}; LoRAs are read in "
                    "float32, float16 and bfloat16. Save it in one of these"
                )


def refuse_kinds(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise UnsupportedError, naming the kind, for tensors of anything but plain LoRAs."""
    for key in tensors:
        for mark, kind in OTHER_KINDS.items():
            if mark in key:
                raise UnsupportedError(
                    f"{name} is a {kind} ({key}), not a LoRA: it is no plain sum of low-rank "
                    f"updates. {FUSE}"
                )


def _refuse_text(name: str, keys: Iterable[str]) -> None:
    if text := [key for key in keys if key.startswith(TEXT)]:
        raise UnsupportedError(
            f"{name} also changes text encoders ({len(text)} tensors, such as {text[0]}), which "
            "DiRotQ leaves as they are: the images would not be the LoRA's. Save a copy without "
            "these tensors if the transformer's part is what you want"
        )


def refuse_misfits(
    name: str, pairs: Mapping[str, Pair], shapes: Mapping[str, tuple[int, ...]], because: str = ""
) -> None:
    """Raise ConfigError for a LoRA of another model, naming its first parts that fit nowhere."""
    misfits = []
    for module, pair in pairs.items():
        shape = shapes.get(f"{module}.weight")
        if shape is None:
            misfits.append(f"{module} (no such module)")
            continue
        halves = {h.key.rpartition(".lora")[2]: tuple(h.tensor.shape) for h in pair.halves}
        if (changed := _changed(pair)) is None:
            misfits.append(f"{module} (its halves don't make a pair: {halves})")
        elif changed != _without_ones(shape):
            misfits.append(f"{module} (changes {list(changed)}, is {list(shape)})")
    if misfits:
        raise ConfigError(
            f"{name} is a LoRA for another model: {len(misfits)} of its {len(pairs)} parts do not "
            f"fit this transformer, first {'; '.join(misfits[:3])}. Give the model that it was "
            f"trained on{because}"
        )


def _changed(pair: Pair) -> tuple[int, ...] | None:
    """Return the shape of up @ down's weight, [N, K] or [N, K, h, w]; None if there is none."""
    if pair.down is None or pair.up is None:
        return None
    down, up = tuple(pair.down.tensor.shape), _without_ones(pair.up.tensor.shape)
    if len(down) < 2 or not down[0] or len(up) != 2 or up[1] != down[0]:
        return None
    return (up[0], *_without_ones(down)[1:])


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    """Take a linear for a 1x1 convolution: [N, K, 1, 1] becomes [N, K]."""
    sizes = list(shape)
    while len(sizes) > 2 and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)
