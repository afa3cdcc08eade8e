"""Pictures that people bring: opened as RGB, or refused by name."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from dirotq.errors import ConfigError
from dirotq.files.digest import Stamp, stamp

if TYPE_CHECKING:
    from PIL.Image import Image


def open_picture(path: str | Path) -> "Image":
    """Decode a whole picture. Raises ConfigError if it is missing, truncated or no picture."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    # Beside OSError: what Pillow's decoders raise for damaged files, and for 180 megapixels.
    except (
        OSError, ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError,
        SyntaxError, TypeError, ValueError, Image.DecompressionBombError,
    ) as error:  # fmt: skip
        raise ConfigError(
            f"{path} can't be read as a picture ({type(error).__name__}: {error}); save it anew as "
            "PNG or JPEG, or name another one"
        ) from error


def check_picture(path: str | Path) -> None:
    """Raise what :func:`open_picture` raises; decoded again only if the file changed."""
    try:
        seen = stamp(Path(path))
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error.strerror})") from error
    _check(str(path), seen)


@functools.lru_cache(maxsize=4096)
def _check(path: str, _: Stamp) -> None:
    open_picture(path)
