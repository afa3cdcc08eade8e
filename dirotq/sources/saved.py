"""A pipeline that is in memory, saved as a folder for as long as it is read."""

import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from dirotq.errors import ConfigError
from dirotq.files.digest import cache_root
from dirotq.models.denoisers import denoisers_of
from dirotq.quiet import quiet


@contextmanager
def saved(pipe: Any) -> Iterator[Path]:
    """Yield a folder in DiRotQ's cache that holds the pipeline; it is removed after the block.

    pipe  a diffusers pipeline around a transformer in 16 or 32 bits, all its weights in memory

    Raises ConfigError for one that would not be saved as it is, or if there is no place for it.
    """
    _refuse_unsavable(pipe)
    sources = cache_root() / "sources"
    key = uuid.uuid4().hex
    draft = sources / f".{key}-saved"  # with its lock, as `dirotq gc --cache` knows them
    lock = FileLock(sources / f"{key}.lock")
    folder = draft / _name(pipe)
    try:
        try:
            sources.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            with quiet():
                pipe.save_pretrained(folder)
        except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
            raise ConfigError(
                f"this {type(pipe).__name__} can't be saved to {draft}: {error}. Name another "
                "place with the environment variable DIROTQ_CACHE, or save it yourself with "
                "save_pretrained(FOLDER) and give that folder"
            ) from error
        yield folder
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        lock.release()
        with suppress(OSError):
            Path(lock.lock_file).unlink()


def _refuse_unsavable(pipe: Any) -> None:
    name = type(pipe).__name__
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        raise ConfigError(
            f"{name} has no transformer; DiRotQ compresses diffusers pipelines around one"
        )
    for part, denoiser in denoisers_of(pipe).items():
        if "quantization_config" in getattr(denoiser, "config", {}):
            raise ConfigError(f"the {part} of this {name} is quantized already; give the original")
        if getattr(denoiser, "_hf_peft_config_loaded", False):
            raise ConfigError(
                f"this {name} has adapters in its {part}, which would be left out: call "
                "pipe.fuse_lora() and pipe.unload_lora_weights() first, or give the model's folder "
                "and the override model.lora=FILE"
            )
    modules = [m for m in pipe.components.values() if callable(getattr(m, "parameters", None))]
    if any(parameter.is_meta for module in modules for parameter in module.parameters()):
        raise ConfigError(
            f"weights of this {name} are offloaded or were never loaded: open it without "
            "offloading, or give its folder"
        )


def _name(pipe: Any) -> str:
    """Return what the card calls the model: the last part of where it came from."""
    given = str(getattr(pipe, "name_or_path", "") or "")
    return re.sub(r"[^\w.-]", "_", Path(given).name).lstrip(".") or type(pipe).__name__
