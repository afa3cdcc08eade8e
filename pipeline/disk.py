"""What reaches the disk, and how to know that it is full."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["is_disk_full", "sync", "sync_tree", "write_json"]


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk or quota is at the root of ``error``, however a library wrapped it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            return True  # safetensors reports its I/O errors as text
        error = error.__cause__ or error.__context__
    return False


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write atomically: a reader finds the old content or the new, never half."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")
    scratch.replace(path)


def sync_tree(folder: Path) -> None:
    """Force every file and folder under ``folder`` to the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Force one file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
