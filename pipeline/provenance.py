"""Who made an artifact, when, where and with what. Recorded beside it, never hashed."""

import contextlib
import functools
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from dirotq.pipeline import graphics
from dirotq.pipeline.peaks import peaks
from dirotq.pipeline.secrecy import without_secrets

__all__ = ["LIBRARIES", "gpu", "provenance", "versions"]

LIBRARIES = (
    "dirotq", "torch", "triton", "diffusers", "transformers", "accelerate", "safetensors",
    "zarr", "numpy", "datasets", "hydra-core", "omegaconf",
)  # fmt: skip


def provenance(started: float, overrides: Sequence[str]) -> dict[str, Any]:
    """The content of provenance.json for work that began at ``started`` (seconds since 1970).

    Peaks of memory are those since :func:`pipeline.peaks.reset_peaks`.
    """
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
        "seconds": round(time.time() - started, 3),
        **peaks(),
        "argv": without_secrets(sys.argv),
        "overrides": list(overrides),
        "git": git_revision(),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "libraries": versions(),
        "gpu": gpu(),
    }


@functools.cache
def versions() -> Mapping[str, str | None]:
    """Installed version of each library that can influence a result; None if absent."""
    found: dict[str, str | None] = dict.fromkeys(LIBRARIES)
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def gpu() -> list[str]:
    """Name, compute capability and driver of each NVIDIA GPU, without loading torch."""
    return [str(found) for found in graphics.installed()]


@functools.cache
def git_revision() -> str | None:
    """Commit of the checkout this code runs from, ``-dirty`` if modified; None outside of one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    return (
        _output(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]) or None
    )


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
