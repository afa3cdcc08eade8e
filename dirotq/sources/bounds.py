"""Settings that would cost minutes or gigabytes before there is an error: refused from headers."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dirotq.errors import ArtifactError
from dirotq.files.json_file import read_json
from dirotq.files.names import components
from dirotq.sources.weights_file import AGAIN, count_tensors

INDEX = "model_index.json"
COUNTS = re.compile("layers|blocks|depth|levels")
"""In the names of settings that say how often something is built, mostly."""
MANY = 512
"""Of anything, which costs a second at most; more of it needs as many tensors."""
MOST_STEPS = 1_000_000
"""Largest number in a scheduler's settings: some of them make tables so long."""
TABLES = re.compile("sample_size|pos_embed_max_size")
WIDEST_TABLE = 1024
"""Largest side of a transformer's table of positions, whose area is computed at construction."""


def refuse_sizes(root: Path) -> None:
    """Look at the headers of a diffusers folder, packed or not, and at how often its settings say
    that something is built.

    Raises ArtifactError naming a weights file that is damaged, or a setting that can't be right;
    ConfigError for settings that are no JSON object.
    """
    for name in components(read_json(root / INDEX)):
        part = root / name
        tensors = sum(count_tensors(file) for file in sorted(part.glob("*.safetensors")))
        for file in sorted(part.glob("*config.json")):
            _check_counts(file, read_json(file), tensors)


def _check_counts(file: Path, settings: Mapping[str, Any], tensors: int) -> None:
    """Refuse what would be built more often than there are tensors for, before it is built."""
    for name, value in _settings(settings):
        most, why = None, ""
        if file.name == "scheduler_config.json":
            most, why = MOST_STEPS, "a scheduler's steps"
        elif tensors and COUNTS.search(name):
            most, why = max(tensors, MANY), "what has its tensors beside it"
        elif file.parent.name.startswith("transformer") and TABLES.search(name):
            most, why = WIDEST_TABLE, "any transformer's table of positions"
        if most is not None and isinstance(value, int) and value > most:
            raise ArtifactError(
                f"{file} says {name} = {value}, more than {why} can be ({most}): the file is "
                f"damaged or of another model; {AGAIN}"
            )


def _settings(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number of nested settings with its nearest name; a list's length counts as one."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key != "quantization_config":
                yield from _settings(inner, str(key))
    elif isinstance(value, list):
        yield name, len(value)
        for inner in value:
            yield from _settings(inner, name)
    else:
        yield name, value
