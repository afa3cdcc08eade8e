"""JSON that people bring, and the names in it, before they become a part of a path.

A component of model_index.json and a shard of a weights index are names of things beside the file
that names them. ``../../x`` or ``/etc/x`` there would read, or write, somewhere else.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dirotq.errors import ConfigError
from dirotq.files.walk import readable

INDEX = "model_index.json"
CALL_FILE = "generation.json"
FORBIDDEN = frozenset('/\\:*?[]"<>|')
"""What separates folders, or means something to globs, somewhere."""


def read_json(file: Path, of: str = "model") -> dict[str, Any]:
    """Read the JSON object in a file.

    of  what to download again if it is damaged

    Raises ConfigError if it is no plain file that may be read, or no JSON object, or holds NaN.
    """
    try:
        return json_object(readable(file).read_text(encoding="utf-8"), str(file), of)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is damaged ({error}); download the {of} again") from error


def json_object(text: str, where: str, of: str) -> dict[str, Any]:
    """Parse a JSON object, named ``where`` in errors. Raises ConfigError as :func:`read_json`."""
    try:
        values = json.loads(text, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is damaged ({error}); download the {of} again") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is no JSON object; download the {of} again")
    return values


def safe_name(name: object, where: str) -> str:
    """Return ``name`` if it is the plain name of a file or folder.

    Raises ConfigError, saying ``where`` it stands, for a path, ``..``, anything hidden, an empty
    name, control characters, no text at all.
    """
    if (
        isinstance(name, str)
        and 0 < len(name.encode(errors="replace")) < 256
        and name.isprintable()
        and name == name.strip()
        and name[0] != "."
        and not FORBIDDEN & set(name)
    ):
        return name
    raise ConfigError(
        f"{where} names {name!r:.80}, which is no plain name (no '/', '\\\\' or other sign that "
        "has a meaning in paths, no dot at the beginning): it could lead out of the model's "
        "folder. Download the model again from where you trust it, or correct the name"
    )


def components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return {component: (library, class)} of a model_index.json, but for those switched off."""
    found = {}
    for name, value in index.items():
        match value:
            case [str(library), str(cls)] if not name.startswith("_"):
                found[safe_name(name, INDEX)] = (library, cls)
    return found


def denoisers(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Name the components of a model_index.json that denoise: the transformer and all of its class,
    as in pipelines with an expert for high noise and one for low noise.
    """
    parts = components(index)
    return tuple(name for name, entry in parts.items() if entry == parts.get("transformer"))


def weight_map(index: Path) -> dict[str, str]:
    """Return {tensor: file beside ``index``} of a ``*.safetensors.index.json``.

    Raises ConfigError if it is damaged, or names anything but plain ``*.safetensors`` files: what
    libraries load under another suffix is a pickle, which can run code.
    """
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict):
        raise ConfigError(
            f"{index} is damaged: it has no weight_map of tensors and files, but {found!r:.80}; "
            "download the model again"
        )
    for file in {str(file): file for file in found.values()}.values():  # may be unhashable
        if not safe_name(file, str(index)).endswith(".safetensors"):
            raise ConfigError(
                f"{index} names {file}: weights are read from .safetensors files only, any other "
                "kind can run code when loaded. Convert it where you trust it: "
                "pipeline.save_pretrained(new_folder, safe_serialization=True)"
            )
    return found


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("a value is NaN")
    return float(name)  # schedulers write Infinity
