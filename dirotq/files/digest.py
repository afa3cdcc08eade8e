"""Content digests of outside inputs, so that a fingerprint speaks of bytes and not of paths."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from dirotq.errors import ConfigError

log = logging.getLogger(__name__)

LARGE = 64 << 20
"""Bytes from which a digest is worth keeping from one run to the next."""
PAUSE = 2 * 10**9
"""Bytes whose hashing somebody will wait for."""
TICK = 100_000_000
"""Nanoseconds within which two changes of a file may bear the same time."""
_SHA256 = re.compile("[0-9a-f]{64}")

Stamp = tuple[int, int, int, int]
"""Size, modification time, change time (ns) and inode: `cp -p` keeps the first two, no user can set
the third."""


def cache_root() -> Path:
    """Return DiRotQ's folder for what can be made again: $DIROTQ_CACHE, or ~/.cache/dirotq."""
    try:
        return Path(os.environ.get("DIROTQ_CACHE") or "~/.cache/dirotq").expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"there is no folder for what can be made again ({error}); name one with the "
            "environment variable DIROTQ_CACHE"
        ) from error


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, as hex; computed once per (path, :data:`Stamp`) and process.

    For what may have been damaged. Inputs that are only told apart: :func:`input_digests`.
    """
    return content_digest(path, "sha256")


def content_digest(path: Path, kind: str) -> str:
    """Return the ``sha256`` of a file, or ``git``: the SHA-1 that names it in a git repository.

    A file that changed a moment ago is read each time: the next change may not show in its times.
    """
    now = stamp(path)
    return _digest(path, kind, now) if _settled(now) else _hash(path, kind)


def input_digests(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the SHA-256 of each file, as hex; large ones are hashed in threads.

    Known already are those above 64 MB whose real path and :data:`Stamp` are those of an earlier
    run (digests.json in :func:`cache_root`; a damaged one is started anew).
    """
    files = list(paths)
    large = [path for path in files if path.stat().st_size > LARGE]
    found = _recall(large)
    missing = [path for path in large if path not in found]
    stamps = {path: stamp(path) for path in missing}  # before they are read
    if (size := sum(seen[0] for seen in stamps.values())) > PAUSE:
        first = next(iter(stamps))
        log.info("%.0f GB of %s and other files are read once, to know them", size / 1e9, first)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        # hashlib lets the other threads run while it computes.
        found |= dict(zip(missing, pool.map(file_digest, missing), strict=True))
    found |= {path: file_digest(path) for path in files if path not in found}
    _remember({p: (old, found[p]) for p, old in stamps.items() if _settled(old)})
    return found


def stamp(path: Path) -> Stamp:
    """Return what changes with a file, as far as its file system tells."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def stamps(folder: Path) -> tuple[tuple[str, Stamp], ...]:
    """Return what changes with a folder, with what is in it, and in the folders there.

    What can't be read has none.
    """
    inside = _listed(folder)
    deeper = [path for one in inside for path in _listed(one)]
    found = []
    for path in (folder, *inside, *deeper):
        with contextlib.suppress(OSError):
            found.append((str(path), stamp(path)))
    return tuple(found)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # a file, for one
        return []


def _settled(seen: Stamp) -> bool:
    return time.time_ns() - max(seen[1:3]) >= TICK


@functools.lru_cache(maxsize=1 << 16)
def _digest(path: Path, kind: str, seen: Stamp) -> str:
    return _hash(path, kind)


def _hash(path: Path, kind: str) -> str:
    with path.open("rb") as f:
        if kind == "sha256":
            return hashlib.file_digest(f, "sha256").hexdigest()
        head = hashlib.sha1(b"blob %d\0" % os.fstat(f.fileno()).st_size, usedforsecurity=False)
        return hashlib.file_digest(f, lambda: head).hexdigest()


# digests.json: {real path: [*Stamp, SHA-256]}. Entries of another shape count for nothing. A folder
# that can't be read or written costs time, not results.


def _recall(files: Iterable[Path]) -> dict[Path, str]:
    """Return the digests that are known of files that did not change since."""
    known: dict[str, object] = {}
    with contextlib.suppress(OSError, ConfigError):
        known = _remembered(cache_root() / "digests.json")
    found = {}
    for path in files:
        match known.get(str(path.resolve())):
            case [*seen, str(digest)] if seen == list(stamp(path)) and _SHA256.fullmatch(digest):
                found[path] = digest
    return found


def _remember(digests: Mapping[Path, tuple[Stamp, str]]) -> None:
    """Keep digests, with the stamps that the files had before they were read."""
    if not digests:
        return
    with contextlib.suppress(OSError, ConfigError):
        file = cache_root() / "digests.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock", timeout=10):
            entries = {str(p.resolve()): [*seen, d] for p, (seen, d) in digests.items()}
            draft = file.with_name(f".digests-{uuid.uuid4().hex[:8]}")
            try:
                draft.write_text(json.dumps(_remembered(file) | entries))
                draft.replace(file)
            finally:
                draft.unlink(missing_ok=True)


def _remembered(file: Path) -> dict[str, object]:
    if not file.is_file():  # a pipe would wait for its writer
        return {}
    try:
        known = json.loads(file.read_text())
    except (ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}
