"""Every supported family, found by the class of a model's transformer."""

import re

from dirotq.errors import UnsupportedError

from .family import ModelFamily
from .flux import FLUX
from .flux2 import FLUX2
from .pixart import PIXART
from .qwen_image import QWEN_IMAGE
from .sana import SANA
from .sd3 import SD3
from .wan import WAN
from .z_image import Z_IMAGE

FAMILIES = (FLUX, FLUX2, PIXART, SANA, SD3, QWEN_IMAGE, Z_IMAGE, WAN)


def known_family(transformer_class: str) -> ModelFamily | None:
    """Find the family of a diffusers transformer class; None if no table describes it."""
    return next((family for family in FAMILIES if family.transformer == transformer_class), None)


def family_of(transformer_class: str) -> ModelFamily:
    """Return the family of a diffusers transformer class: a table, or the name alone for a class
    of diffusers that has none, whose sites are to be discovered (models/discovery.py).

    Raises UnsupportedError, naming the known ones, for what is no transformer of diffusers.
    """
    if (family := known_family(transformer_class)) is not None:
        return family
    if re.search("Transformer|DiT", transformer_class):
        import diffusers  # takes seconds, and is needed only here

        if hasattr(diffusers, transformer_class):
            return ModelFamily("discovered", transformer_class, rules=(), keep=(), call={})
    known = ", ".join(f"{f.name} ({f.transformer})" for f in FAMILIES)
    raise UnsupportedError(
        f"{transformer_class!r} is no transformer class of the installed diffusers; described are "
        f"{known}, others of diffusers are discovered. CONTRIBUTING.md says how to add a family (a "
        "table of about 40 lines)."
    )
