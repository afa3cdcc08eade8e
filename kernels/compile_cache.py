"""Where compilers keep their work on disk: somewhere else, if that place can't be written."""

import functools
import logging
import os
import tempfile
from pathlib import Path

from .chip import say_once


@functools.cache
def usable(variable: str, place: str) -> str:
    """Return a folder that can be written: ``place``, or one for this process alone, which is said.

    variable  of the environment, by which the compiler is told; it is set for the second
    """
    try:
        Path(place).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            return place
    except OSError as error:
        other = tempfile.mkdtemp(prefix="dirotq-")
        os.environ[variable] = other
        say_once(
            f"{place} can't be written ({error.strerror}): what is compiled is kept in {other}, "
            f"for this process alone; set {variable} to a folder that can be written",
            logging.WARNING,
        )
        return other


@functools.cache
def triton() -> str:
    """Return Triton's folder, made usable."""
    from triton import knobs

    return usable("TRITON_CACHE_DIR", str(knobs.cache.dir))


def inductor() -> str:
    """Return Inductor's folder, made usable."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    name = "TORCHINDUCTOR_CACHE_DIR"
    return usable(name, os.environ.get(name) or default_cache_dir())


def humming() -> str:
    """Return Humming's folder, made usable."""
    name = "HUMMING_CACHE_DIR"
    place = os.environ.get(name) or os.path.expanduser("~/.humming/cache")  # noqa: PTH111 - as it
    return usable(name, place)
