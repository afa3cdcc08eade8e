"""Names that people's files give us, before they become a part of a path.

A component of model_index.json and a shard of a weights index are names of things beside the file
that names them. ``../../x`` or ``/etc/x`` there would read, or write, somewhere else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dirotq.errors import ConfigError
from dirotq.files.json_file import read_json

INDEX = "model_index.json"
CALL_FILE = "generation.json"
FORBIDDEN = frozenset('/\\:*?[]"<>|')
"""What separates folders, or means something to globs, somewhere."""


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
    """Return {component: (library, class)} of a model_index.json, but for those switched off.

    Raises ConfigError if a component's name is no plain name.
    """
    found = {}
    for name, value in index.items():
        match value:
            case [str(library), str(cls)] if not name.startswith("_"):
                found[safe_name(name, INDEX)] = (library, cls)
    return found


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
