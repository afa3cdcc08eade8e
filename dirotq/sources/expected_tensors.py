"""What a model component's files must hold, told by the class that will read them.

Nothing is guessed: transformers' own loader is run on tensors without memory, made of the files'
headers, so that tied weights, renamed and converted ones count as they do when it loads. diffusers
compares names; so is done here, with its exceptions. No weight is read, no memory is taken.
"""

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dirotq.files.json_file import read_json
from dirotq.models.skeleton import empty_transformer
from dirotq.sources.weights import named

Shapes = Mapping[str, tuple[int, ...]]

COUNTER = "num_batches_tracked"
"""How often a batch norm was trained: nothing that is computed depends on it."""


def difference(cls: Any, part: Path, shapes: Shapes, *, exact: bool = False) -> str:
    """Say what loading ``shapes`` into ``cls`` by ``part/config.json`` would miss or drop, or "".

    exact  names are to be the class's own: no old spellings (what reads tensors by name needs this)

    Raises what the class raises for a config that it can't be built with.
    """
    if hasattr(cls, "load_config"):
        return _of_diffusers(cls, part, shapes, exact)
    return _of_transformers(cls, part, shapes)


def _of_diffusers(cls: Any, part: Path, shapes: Shapes, exact: bool) -> str:
    config = cls.load_config(part, local_files_only=True)
    model = empty_transformer(config, cls, buffers=False)
    found = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if not exact and not (part / "diffusion_pytorch_model.safetensors.index.json").is_file():
        model._fix_state_dict_keys_on_load(found)  # not done for shards
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    spare = [*(model._keys_to_ignore_on_load_unexpected or ()), *_computed(model)]
    return _said(
        missing=[n for n in wanted if n not in found and not n.endswith(COUNTER)],
        unexpected=_without(found.keys() - wanted.keys(), spare),
        misshapen=[
            f"{n} ({list(found[n].shape)}, expected {list(shape)})"
            for n, shape in wanted.items()
            if n in found and tuple(found[n].shape) != shape
        ],
    )


def _of_transformers(cls: Any, part: Path, shapes: Shapes) -> str:
    model, info = _asked(cls, part, shapes)
    unexpected = set(_without(info["unexpected_keys"], _computed(model)))
    # Not of model.config, which may be one part of what the file says.
    saved_from = read_json(part / "config.json").get("architectures") or ()
    for name in saved_from if unexpected else ():
        # Saved by a larger class, whose other parts this pipeline has no use for: nothing is wrong.
        import transformers

        larger = getattr(transformers, str(name), None)
        if larger is not None and larger is not cls and hasattr(larger, "base_model_prefix"):
            with contextlib.suppress(Exception):  # then it is not what the file was saved from
                unexpected &= _asked(larger, part, shapes)[1]["unexpected_keys"]
    return _said(
        missing=sorted(n for n in info["missing_keys"] if not n.endswith(COUNTER)),
        unexpected=sorted(unexpected),
        misshapen=[
            f"{name} ({list(found)}, expected {list(wanted)})"
            for name, found, wanted in sorted(info["mismatched_keys"])
        ],
    )


def _asked(cls: Any, part: Path, shapes: Shapes) -> tuple[Any, dict[str, set[Any]]]:
    """Return the model on the meta device, and what transformers says about loading it."""
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


def _said(missing: Sequence[str], unexpected: Sequence[str], misshapen: Sequence[str]) -> str:
    """Name what the files lack, what they hold too much, and what has another shape."""
    parts = (
        ("lacks", missing, "which would be random"),
        ("holds", unexpected, "that its class has no place for"),
        ("holds", misshapen, "of another shape than its config.json says"),
    )
    said = [f"{verb} {named(names)} {why}" for verb, names, why in parts if names]
    return " and ".join(said) + _prefix_hint(missing, unexpected)


def _prefix_hint(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """Name a prefix that wrappers leave before every name (DataParallel, torch.compile)."""
    for name in unexpected[:1]:
        parts = name.split(".")
        for cut in range(1, min(3, len(parts))):
            prefix = ".".join(parts[:cut]) + "."
            if any(n.removeprefix(prefix) in missing for n in unexpected):
                return (
                    f" (every name has {prefix!r} before it, as if the wrapper of a model had "
                    "been saved: save the model inside of it)"
                )
    return ""


def _computed(model: torch.nn.Module) -> list[str]:
    """Return patterns of buffers that a model computes and older versions of it stored."""
    stored_too = model.state_dict().keys()
    return [f"^{re.escape(n)}$" for n, _ in model.named_buffers() if n not in stored_too]


def _without(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return sorted(n for n in names if not any(re.search(pattern, n) for pattern in patterns))
