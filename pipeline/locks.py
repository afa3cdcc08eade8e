"""Locks of artifacts: readers share one; who makes, replaces or removes an artifact is alone.

One empty file per key, locked with flock(2): a lock ends with its process. filelock's FileLock
locks the same way but cannot share, and its ReadWriteLock is a database, which a reader of a
read-only store cannot write. Whoever holds several locks took them in the order of the graph, and
nobody who holds one waits for an earlier one, so nobody waits for ever.
"""

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from dirotq.errors import ArtifactError
from dirotq.pipeline.disk import is_disk_full

log = logging.getLogger(__name__)

FOLDER = ".locks"  # of the store's root


class InUseError(ArtifactError):
    """Another process reads, makes or replaces the artifact, and nobody wanted to wait for it."""


def lock_of(artifact: Path) -> Path:
    """Return the lock file of ``<store>/<stage>/<fingerprint>`` and of what becomes that."""
    stage, key = artifact.absolute().parent, artifact.name.split(".")[0]
    return stage.parent / FOLDER / f"{stage.name}-{key}.lock"


@contextlib.contextmanager
def alone(artifact: Path, *, wait: bool = True, remove: bool = False) -> Iterator[None]:
    """Hold the lock alone: nobody else reads, makes or removes the artifact until the block ends.

    wait    for the others; without it InUseError is raised if there are any
    remove  go on without a lock file if the disk is too full for one: nobody can hold what is not
            there

    Raises OSError if the lock file can be neither opened nor made.
    """
    excused = is_disk_full if remove else lambda error: False
    with _held(artifact, fcntl.LOCK_EX, wait, excused):
        yield


@contextlib.contextmanager
def shared(artifact: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock with other readers: nobody replaces or removes the artifact meanwhile.

    Where the lock file can be neither opened nor made (a read-only store) it is read without.
    """
    with _held(artifact, fcntl.LOCK_SH, wait, lambda error: True):
        yield


def is_held(artifact: Path) -> bool:
    """Tell whether a living process reads or makes the artifact, as far as this user can tell."""
    file = lock_of(artifact)
    try:
        if not file.exists():
            return False
        with _held(artifact, fcntl.LOCK_EX, False, lambda error: True):
            return False
    except InUseError:
        return True


@contextlib.contextmanager
def _held(
    artifact: Path, how: int, wait: bool, excused: Callable[[OSError], bool]
) -> Iterator[None]:
    file = lock_of(artifact)
    try:
        handle = _locked(file, how, wait)
    except OSError as error:
        if not excused(error):
            raise
        if file.exists():
            log.warning("%s is used without its lock: %s", artifact, error)
        yield
        return
    try:
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # a forked child may have the handle too
        os.close(handle)


def _locked(file: Path, how: int, wait: bool) -> int:
    """Open and lock ``file``, again if somebody removed it meanwhile."""
    while True:
        handle = _opened(file)
        try:
            _lock(handle, how, wait, file.stem)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), file.stat()):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _opened(file: Path) -> int:
    """Open it, made for all whom the umask allows. Another user's can be locked all the same."""
    errors = []
    for way in (os.O_RDWR | os.O_CREAT, os.O_RDWR, os.O_RDONLY):
        try:
            return os.open(file, way | os.O_CLOEXEC, 0o666)
        except OSError as error:
            errors.append(error)
    raise errors[0]


def _lock(handle: int, how: int, wait: bool, name: str) -> None:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise InUseError(f"{name} is in use: another process reads it or makes it") from None
        does = "that is computing" if how == fcntl.LOCK_SH else "that computes or reads"
        log.info("waiting for another process %s %s", does, name)
        fcntl.flock(handle, how)
