"""Names that people's files give us, before they become a part of a path.

A component of model_index.json and a shard of a weights index are names of things beside the file
that names them. ``../../x`` or ``/etc/x`` there would read, or write, somewhere else.
"""

import json
from pathlib import Path

from dirotq.errors import ConfigError

FORBIDDEN = frozenset('/\\:*?[]"<>|')
"""What separates folders, or means something to globs, somewhere."""


def safe_name(name: object, where: str) -> str:
    """``name``, if it is the plain name of a file or folder.

    where  what names it, in the error

    Raises ConfigError for everything else: a path, ``..``, anything hidden, an empty name, control
    characters, no text at all.
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


def weight_map(index: Path) -> dict[str, str]:
    """{tensor: file beside ``index``} of a ``*.safetensors.index.json``.

    Raises ConfigError if it is damaged, or names anything but plain ``*.safetensors`` files: what
    libraries load under another suffix is a pickle, which can run code.
    """
    try:
        found = json.loads(index.read_text())["weight_map"]
        pairs = list(found.items())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{index} is damaged: it should be a JSON object with a weight_map of tensors and "
            f"files ({type(error).__name__}: {error}); download the model again"
        ) from error
    for file in {str(file): file for _, file in pairs}.values():
        if not safe_name(file, str(index)).endswith(".safetensors"):
            raise ConfigError(
                f"{index} names {file}: weights are read from .safetensors files only, any other "
                "kind can run code when loaded. Convert it where you trust it: "
                "pipeline.save_pretrained(new_folder, safe_serialization=True)"
            )
    return dict(pairs)
