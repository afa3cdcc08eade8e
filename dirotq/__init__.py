"""DiRotQ: compress a diffusion transformer to 4 bits in the directions that do not matter.

This module is the front door and stays light: importing it loads neither torch nor diffusers.
``dirotq.load``, ``dirotq.accelerate``, ``dirotq.compress`` and ``dirotq.export`` arrive with their
first use; ``import dirotq`` alone is enough for ``DiffusionPipeline.from_pretrained`` to accept a
packed folder.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dirotq.compressing import Compressed, compress
    from dirotq.exports.export import export
    from dirotq.loading import load
    from dirotq.runtime.accelerate import accelerate

__all__ = ["Compressed", "__version__", "accelerate", "compress", "export", "load"]
__version__ = "0.2.0"

# In a checkout, pipeline/, stages/, kernels/, ... stand beside this folder and are importable only
# as dirotq.<folder>: at the top level `kernels` would hide Hugging Face's package of that name.
# A wheel holds them inside this folder, so there is nothing to add.
_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pyproject.toml").is_file():
    __path__.append(str(_CHECKOUT))

_LAZY = {
    "load": "dirotq.loading",
    "compress": "dirotq.compressing",
    "Compressed": "dirotq.compressing",
    "accelerate": "dirotq.runtime.accelerate",
    "export": "dirotq.exports.export",
}


def __getattr__(name: str) -> Any:
    """Import what ``dirotq.load`` and its neighbours need only when they are asked for."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'dirotq' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Name what is public: the rest is for ourselves."""
    return sorted(__all__)


from dirotq._registration import register_when_imported  # noqa: E402

register_when_imported()
