"""The library that is installed, in the words of an error, beside the one that saved a folder."""

import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

SAVED_BY = {"diffusers": "_diffusers_version", "transformers": "transformers_version"}
"""What a library calls its version in model_index.json and in each config.json."""


def installed(config: Mapping[str, Any], library: str = "diffusers") -> str:
    """Name the installed library; if a newer one wrote ``config``, also that, and what to do.

    config  what a model_index.json or a component's config.json holds
    """
    here = f"the installed {library} {version(library)}"
    if not is_newer(config, library):
        return here
    saved = str(config.get(SAVED_BY[library]))
    need = ".".join(map(str, _numbers(saved)))
    return (
        f"{here} (the folder was saved by {saved}: pip install -U '{library}>={need}', or from its "
        "repository while that is not released)"
    )


def is_newer(config: Mapping[str, Any], library: str = "diffusers") -> bool:
    """Tell whether a newer library than the installed one wrote ``config``."""
    saved = str(config.get(SAVED_BY[library]))
    return _numbers(saved) > _numbers(version(library))


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release)[:3])
