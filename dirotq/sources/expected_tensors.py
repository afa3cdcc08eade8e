"""What a model component's files must hold, told by the class that will read them.

Nothing is guessed: transformers' own loader is run on tensors without memory, made of the files'
headers, so that tied weights, renamed and converted ones count as they do when it loads. diffusers
compares names; so is done here, with its exceptions. No weight is read, no memory is taken.
"""

import collections
import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dirotq.errors import ArtifactError
from dirotq.files.names import weight_map
from dirotq.sources.weights_file import check_weights

Shapes = Mapping[str, tuple[int, ...]]

COUNTER = "num_batches_tracked"
"""How often a batch norm was trained: nothing that is computed depends on it."""
DEEP = re.compile(r"(num|n)_\w*(layers|blocks)|depth|(num|n)_layers?")
"""Settings that say how often a block is repeated."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What the files lack, what they hold too much, and what has another shape."""

    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    misshapen: Sequence[str] = ()

    def __str__(self) -> str:
        parts = (
            ("lacks", self.missing, "which would be random"),
            ("holds", self.unexpected, "that its class has no place for"),
            ("holds", self.misshapen, "of another shape than its config.json says"),
        )
        said = [f"{verb} {_named(names)} {why}" for verb, names, why in parts if names]
        return " and ".join(said) + self._hint()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def _hint(self) -> str:
        """A prefix that wrappers leave before every name (DataParallel, torch.compile)."""
        wanted = set(self.missing)
        for name in self.unexpected[:1]:
            parts = name.split(".")
            for cut in range(1, min(3, len(parts))):
                prefix = ".".join(parts[:cut]) + "."
                if any(n.removeprefix(prefix) in wanted for n in self.unexpected):
                    return (
                        f" (every name has {prefix!r} before it, as if the wrapper of a model had "
                        "been saved: save the model inside of it)"
                    )
        return ""


def weight_files(part: Path, *, diffusers: bool) -> list[Path]:
    """The files that will be read of a component, by the rules of the library that reads them.

    Raises ArtifactError if there are none, or they do not hold what their index says; ConfigError
    if that is damaged or names something else than safetensors beside it.
    """
    stem = "diffusion_pytorch_model" if diffusers else "model"
    whole, index = part / f"{stem}.safetensors", part / f"{stem}.safetensors.index.json"
    # With both there, diffusers reads the shards and transformers the single file.
    if whole.is_file() and not (diffusers and index.is_file()):
        return [whole]
    if not index.is_file():
        raise ArtifactError(f"has no {whole.name}")
    by_file = collections.defaultdict(set)
    for name, file in weight_map(index).items():
        by_file[file].add(name)
    for file, names in by_file.items():
        if not (part / file).is_file():
            raise ArtifactError(f"lacks {file}, which its {index.name} names")
        held = stored([part / file]).keys()
        if lost := sorted(names - held):
            raise ArtifactError(
                f"has a {index.name} that looks for {_named(lost)} in {file}, which is not there"
            )
        if diffusers and (more := sorted(held - names)):
            raise ArtifactError(f"has {_named(more)} in {file}, which its {index.name} leaves out")
    return [part / file for file in sorted(by_file)]


def stored(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the files, from their headers.

    Raises ArtifactError if a file is truncated, or two of them hold the same tensor.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        check_weights(file)
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name in found:
                    raise ArtifactError(f"holds {name} twice, in {file.name} and in another file")
                found[name] = tuple(tensors.get_slice(name).get_shape())
    return found


def difference(cls: Any, part: Path, shapes: Shapes, *, exact: bool = False) -> Difference:
    """What loading ``shapes`` into ``cls`` as ``part/config.json`` describes it would miss or drop.

    exact  names are to be the class's own: no old spellings (what reads tensors by name needs this)

    Raises what the class raises for a config that it can't be built with.
    """
    if hasattr(cls, "load_config"):
        return _of_diffusers(cls, part, shapes, exact)
    return _of_transformers(cls, part, shapes)


def too_deep(config: Any, count: int) -> str | None:
    """A setting that repeats blocks more often than the files have tensors, if there is one.

    The class would be built first and compared then, which takes forever for a million layers.
    """
    if isinstance(config, dict):
        for key, value in config.items():
            if DEEP.fullmatch(key) and isinstance(value, int) and value > max(count, 1000):
                return f"{key}: {value}"
            if inside := too_deep(value, count):
                return inside
    return None


def _of_diffusers(cls: Any, part: Path, shapes: Shapes, exact: bool) -> Difference:
    import accelerate

    with accelerate.init_empty_weights():
        model = cls.from_config(cls.load_config(part, local_files_only=True))
    found = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if not exact and not (part / "diffusion_pytorch_model.safetensors.index.json").is_file():
        model._fix_state_dict_keys_on_load(found)  # not done for shards
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    spare = [*(model._keys_to_ignore_on_load_unexpected or ()), *_computed(model)]
    return Difference(
        missing=[n for n in wanted if n not in found and not n.endswith(COUNTER)],
        unexpected=_without(found.keys() - wanted.keys(), spare),
        misshapen=[
            f"{n} ({list(found[n].shape)}, expected {list(shape)})"
            for n, shape in wanted.items()
            if n in found and tuple(found[n].shape) != shape
        ],
    )


def _of_transformers(cls: Any, part: Path, shapes: Shapes) -> Difference:
    model, info = _asked(cls, part, shapes)
    unexpected = set(_without(info["unexpected_keys"], _computed(model)))
    # Not of model.config, which may be one part of what the file says.
    saved_from = json.loads((part / "config.json").read_text()).get("architectures") or ()
    for name in saved_from if unexpected else ():
        # Saved by a larger class, whose other parts this pipeline has no use for: nothing is wrong.
        import transformers

        larger = getattr(transformers, str(name), None)
        if larger is not None and larger is not cls and hasattr(larger, "base_model_prefix"):
            with contextlib.suppress(Exception):  # then it is not what the file was saved from
                unexpected &= _asked(larger, part, shapes)[1]["unexpected_keys"]
    return Difference(
        missing=sorted(n for n in info["missing_keys"] if not n.endswith(COUNTER)),
        unexpected=sorted(unexpected),
        misshapen=[
            f"{name} ({list(found)}, expected {list(wanted)})"
            for name, found, wanted in sorted(info["mismatched_keys"])
        ],
    )


def _asked(cls: Any, part: Path, shapes: Shapes) -> tuple[Any, dict[str, set[Any]]]:
    """The model on the meta device, and what transformers says about loading it."""
    found = {n: torch.empty(s, dtype=torch.bfloat16, device="meta") for n, s in shapes.items()}
    model, info = cls.from_pretrained(
        None,
        config=cls.config_class.from_pretrained(part, local_files_only=True),
        state_dict=found,
        device_map={"": "meta"},
        dtype=torch.bfloat16,
        ignore_mismatched_sizes=True,  # they are named by us
        output_loading_info=True,
    )
    return model, info


def _computed(model: torch.nn.Module) -> list[str]:
    """Patterns of buffers that a model computes and older versions of it stored."""
    stored_too = model.state_dict().keys()
    return [f"^{re.escape(n)}$" for n, _ in model.named_buffers() if n not in stored_too]


def _without(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return sorted(n for n in names if not any(re.search(pattern, n) for pattern in patterns))


def _named(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"the tensor {names[0]}"
    return f"{len(names)} tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
