"""Every supported family, found by the class of a model's transformer."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dirotq.errors import UnsupportedError
from dirotq.pipeline.settings import close_to

from .family import ModelFamily
from .flux import FLUX
from .flux2 import FLUX2
from .hunyuan_video import HUNYUAN_VIDEO
from .ideogram4 import IDEOGRAM4
from .installed import installed
from .krea2 import KREA2
from .ltx2 import LTX2
from .pixart import PIXART
from .qwen_image import QWEN_IMAGE
from .qwen_image21 import QWEN_IMAGE21
from .sana import SANA
from .sd3 import SD3
from .wan import WAN
from .z_image import Z_IMAGE

FAMILIES = (
    *(FLUX, FLUX2, PIXART, SANA, SD3, QWEN_IMAGE, Z_IMAGE, WAN),
    *(QWEN_IMAGE21, KREA2, IDEOGRAM4, HUNYUAN_VIDEO, LTX2),
)


def known_family(transformer_class: str) -> ModelFamily | None:
    """Find the family of a diffusers transformer class; None if no table describes it."""
    return next((family for family in FAMILIES if family.transformer == transformer_class), None)


def family_of(
    transformer_class: str, config: Mapping[str, Any] = MappingProxyType({})
) -> ModelFamily:
    """Return the family of a diffusers transformer class: a table, or the name alone for a class
    of diffusers that has none, whose sites are to be discovered (models/discovery.py).

    config  what transformer/config.json says, for the version in an error

    Raises UnsupportedError, naming the known ones, for what is no transformer of diffusers.
    """
    if (family := known_family(transformer_class)) is not None:
        return family
    import diffusers  # takes seconds, and is needed only here

    if is_denoiser(getattr(diffusers, transformer_class, None)):
        return ModelFamily("discovered", transformer_class, rules=(), keep=(), call={})
    known = ", ".join(f"{f.name} ({f.transformer})" for f in FAMILIES)
    raise UnsupportedError(
        f"{transformer_class!r} is no transformer class of {installed(config)};"
        f"{close_to(transformer_class, _denoisers_of(diffusers))} described are {known}, others of "
        "diffusers are discovered. CONTRIBUTING.md says how to "
        "add a family (a table of about 40 lines)."
    )


def is_denoiser(cls: Any) -> bool:
    """Tell whether a class is one of diffusers' transformers."""
    return getattr(cls, "__module__", "").startswith("diffusers.models.transformers.")


def _denoisers_of(diffusers: Any) -> list[str]:
    """List the names of diffusers' transformers; none is imported."""
    return [name for name in dir(diffusers) if "Transformer" in name and name.endswith("Model")]
