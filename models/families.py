"""Every supported family, found by the class of a model's transformer."""

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
    """The family of a diffusers transformer class, or None."""
    return next((family for family in FAMILIES if family.transformer == transformer_class), None)


def family_of(transformer_class: str) -> ModelFamily:
    """The family of a diffusers transformer class; UnsupportedError names the known ones."""
    if (family := known_family(transformer_class)) is not None:
        return family
    known = ", ".join(f"{f.name} ({f.transformer})" for f in FAMILIES)
    raise UnsupportedError(
        f"no model family describes the transformer class {transformer_class!r}; supported: "
        f"{known}. CONTRIBUTING.md says how to add one (a table of about 40 lines)."
    )
