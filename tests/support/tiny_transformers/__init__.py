"""A tiny random transformer of every class in diffusers.models.transformers."""

from functools import cache
from typing import Any

import diffusers
from diffusers.models.modeling_utils import ModelMixin
from tiny_families import TINY

from dirotq.models.families import known_family

from .images import IMAGES
from .others import OTHERS
from .row import Row, wide
from .sounding import SOUNDING
from .videos import VIDEOS

UNTABLED: dict[str, Row] = IMAGES | VIDEOS | SOUNDING | OTHERS
"""Classes that no family table describes."""


@cache
def classes() -> list[str]:
    """Name every transformer class of the installed diffusers."""
    module = diffusers.models.transformers
    found = {name: getattr(module, name) for name in dir(module)}
    return sorted(
        name for name, cls in found.items() if isinstance(cls, type) and issubclass(cls, ModelMixin)
    )


def made(name: str) -> tuple[Any, dict[str, Any]]:
    """Make a class's transformer in float64, and the arguments of one call of it."""
    if (family := known_family(name)) is not None:
        tiny = TINY[family.name]
        guided = {"guidance_embeds": True} if "guidance" in tiny.inputs() else {}
        return tiny.build(**guided).double(), wide(tiny.inputs())
    return UNTABLED[name].build(name), wide(UNTABLED[name].inputs())
