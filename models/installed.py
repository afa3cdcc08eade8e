"""The diffusers that is installed, in the words of an error, beside the one that saved a folder."""

import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

SAVED_BY = "_diffusers_version"
"""What diffusers calls its version in model_index.json and in each config.json."""


def installed_diffusers(config: Mapping[str, Any]) -> str:
    """Name the installed diffusers; if a newer one wrote ``config``, also that, and what to do.

    config  what a model_index.json or a component's config.json holds
    """
    installed, saved = version("diffusers"), str(config.get(SAVED_BY))
    if _numbers(saved) <= _numbers(installed):
        return f"the installed diffusers {installed}"
    need = ".".join(map(str, _numbers(saved)))
    return (
        f"the installed diffusers {installed} (the folder was saved by {saved}: pip install -U "
        f"'diffusers>={need}', or from its repository while that is not released)"
    )


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release)[:3])
