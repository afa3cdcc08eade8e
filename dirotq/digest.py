"""Content digests of outside inputs, so that a fingerprint speaks of bytes and not of paths."""

import contextlib
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

LARGE = 64 << 20
"""Bytes from which a digest is worth keeping from one run to the next."""


def cache_root() -> Path:
    """DiRotQ's folder for what can be made again: $DIROTQ_CACHE, or ~/.cache/dirotq."""
    return Path(os.environ.get("DIROTQ_CACHE") or "~/.cache/dirotq").expanduser()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hex; computed once per (path, size, modification time) and process.

    For what may have been damaged. Inputs that are only told apart: :func:`input_digests`.
    """
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


def input_digests(paths: Iterable[Path]) -> dict[Path, str]:
    """SHA-256 of each file, as hex, hashed in threads where it is not known already.

    Known are the files of a Hugging Face cache that are named by their SHA-256, and those above 64
    MB whose path, size and modification time are those of an earlier run (digests.json in
    :func:`cache_root`; a damaged one is started anew).
    """
    files = list(paths)
    found = {path: digest for path in files if (digest := _blob_name(path)) is not None}
    memory = _Memory()
    large = [path for path in files if path not in found and path.stat().st_size > LARGE]
    found |= {path: digest for path in large if (digest := memory.recall(path)) is not None}
    missing = [path for path in files if path not in found]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        # hashlib lets the other threads run while it computes.
        found |= dict(zip(missing, pool.map(file_digest, missing), strict=True))
    memory.remember({path: found[path] for path in large if path in missing})
    return found


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _blob_name(path: Path) -> str | None:
    """The name of the blob that a link in a Hugging Face cache leads to, if it is a SHA-256."""
    if not path.is_symlink():
        return None
    blob = path.resolve()
    named = blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name)
    return blob.name if named else None


class _Memory:
    """digests.json: {real path: [size, modification time in ns, SHA-256]}."""

    def __init__(self) -> None:
        self.file = cache_root() / "digests.json"

    def recall(self, path: Path) -> str | None:
        entry = self._read().get(str(path.resolve()))
        stat = path.stat()
        match entry:
            case [size, mtime_ns, str(digest)] if [size, mtime_ns] == [
                stat.st_size,
                stat.st_mtime_ns,
            ]:
                return digest if re.fullmatch("[0-9a-f]{64}", digest) else None
        return None

    def remember(self, digests: dict[Path, str]) -> None:
        """Keep digests for the next run. A folder that can't be written costs time, not results."""
        if not digests:
            return
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.file}.lock"):
                known = self._read()
                for path, digest in digests.items():
                    stat = path.stat()
                    known[str(path.resolve())] = [stat.st_size, stat.st_mtime_ns, digest]
                with tempfile.NamedTemporaryFile(
                    "w", dir=self.file.parent, prefix=".digests-", delete=False
                ) as f:
                    json.dump(known, f)
                Path(f.name).replace(self.file)

    def _read(self) -> dict[str, object]:
        try:
            known = json.loads(self.file.read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}
