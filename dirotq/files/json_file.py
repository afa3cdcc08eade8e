"""JSON that people bring."""

import json
from pathlib import Path
from typing import Any

from dirotq.errors import ConfigError
from dirotq.files.walk import readable


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


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("a value is NaN")
    return float(name)  # schedulers write Infinity
