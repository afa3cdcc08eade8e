"""Who made an artifact, when, where, with what, and the memory it took. Recorded, never hashed."""

import contextlib
import functools
import gc
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from dirotq.pipeline import graphics
from dirotq.pipeline.secrecy import without_secrets

LIBRARIES = (
    "dirotq", "torch", "triton", "diffusers", "transformers", "accelerate", "safetensors",
    "zarr", "numpy", "datasets", "hydra-core", "omegaconf",
)  # fmt: skip


def provenance(started: float, overrides: Sequence[str]) -> dict[str, Any]:
    """Return provenance.json of work that began at ``started`` (seconds since 1970)."""
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
        "gpu": [str(found) for found in graphics.installed()],
    }


def peaks() -> dict[str, int]:
    """Return this process's peaks of memory since :func:`reset_peaks`, in bytes.

    The GPU's, as reserved by torch, only where one was used.
    """
    found = {"peak_rss_bytes": _peak_rss()}
    if cuda := _cuda():
        found["peak_vram_bytes"] = int(cuda.max_memory_reserved())
    return found


def reset_peaks() -> None:
    """Begin a stretch of work: both peaks start again from what is in use now."""
    with contextlib.suppress(OSError):  # Linux; elsewhere the peak stays that of the whole process
        Path("/proc/self/clear_refs").write_text("5")
    if cuda := _cuda():
        gc.collect()  # coroutines and hooks form cycles that still hold memory
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()


@functools.cache
def versions() -> Mapping[str, str | None]:
    """Return the installed version of each library that can influence a result; None if absent."""
    found: dict[str, str | None] = dict.fromkeys(LIBRARIES)
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@functools.cache
def git_revision() -> str | None:
    """Return the commit of this code's checkout, ``-dirty`` if modified; None outside of one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _peak_rss() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def _cuda() -> Any:
    """Return torch.cuda if a stage imported torch and has a GPU at work; the core imports none."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
