"""JSON that people bring."""

import json
from pathlib import Path
from typing import Any

from dirotq.errors import ConfigError
from dirotq.files.walk import readable


def read_json(file: Path) -> dict[str, Any]:
    """Raises ConfigError if it is no plain file that may be read, or no JSON object."""
    try:
        values = json.loads(readable(file).read_text())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is damaged ({error}); download the model again") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} is no JSON object; download the model again")
    return values
