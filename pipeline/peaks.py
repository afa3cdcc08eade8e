"""Peak memory of a stretch of work in this process: RAM, and the GPU's if torch is loaded."""

import contextlib
import gc
import resource
import sys
from pathlib import Path
from typing import Any

__all__ = ["peaks", "reset_peaks"]


def reset_peaks() -> None:
    """Begin a stretch: both peaks start again from what is in use now."""
    with contextlib.suppress(OSError):  # Linux; elsewhere the peak stays that of the whole process
        Path("/proc/self/clear_refs").write_text("5")
    if cuda := _cuda():
        gc.collect()  # coroutines and hooks form cycles that still hold memory
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()


def peaks() -> dict[str, int]:
    """``peak_rss_bytes`` and, where a GPU was used, ``peak_vram_bytes`` (as reserved by torch)."""
    found = {"peak_rss_bytes": _peak_rss()}
    if cuda := _cuda():
        found["peak_vram_bytes"] = cuda.max_memory_reserved()
    return found


def _peak_rss() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def _cuda() -> Any:
    """torch.cuda if torch was imported by a stage and has a GPU at work; the core imports none."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
