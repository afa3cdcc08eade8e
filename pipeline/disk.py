"""What reaches the disk, who may read it, and how to know that it is full."""

import contextlib
import errno
import json
import os
import pwd
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

FULL = (errno.ENOSPC, errno.EDQUOT)
BUSY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
"""What removing a folder meets while somebody else adds files to it, or removes some."""
PATIENCE = 3.0
"""Seconds in which a process that has done its work writes the last lines of its log."""


def is_disk_full(error: BaseException | None) -> bool:
    """Tell whether a full disk or quota caused ``error``, however a library wrapped it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(os.strerror(code) in str(error) for code in FULL):
            return True  # safetensors reports its I/O errors as text
        error = error.__cause__ or error.__context__
    return False


def write_json(path: Path, value: Mapping[str, Any], *, durable: bool = False) -> None:
    """Write atomically: a reader finds the old content or the new, never half.

    durable  also after a power cut; takes some milliseconds

    The scratch file beside ``path`` is called as :func:`scratch_of` says; ``gc`` may take one for a
    dead process's and remove it, so it is written again if it vanished.
    """
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    while True:
        try:
            with replacing(path, durable=durable) as scratch:
                scratch.write_text(text, encoding="utf-8")
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise
            continue
        if durable:
            sync(path.parent)
        return


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Give a scratch file beside ``path`` to write, which takes its place when the block ends and
    is removed if anything fails. ``durable``: its bytes reach the disk first."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}")
    try:
        yield scratch
        if durable:
            sync(scratch)
        scratch.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise


def remove_tree(folder: Path) -> None:
    """Remove a folder, if it is there. What others still put into it meanwhile goes too.

    Raises OSError if that does not end within :data:`PATIENCE`, and for what can't be removed.
    """
    end = time.monotonic() + PATIENCE
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except OSError as error:
            if error.errno not in BUSY or time.monotonic() > end:
                raise
            time.sleep(0.05)


def scratch_of(folder: Path, name: str) -> Iterator[Path]:
    """Yield what processes left that died in :func:`replacing` ``folder/name``."""
    return folder.glob(f".{name}.*")


def open_modes(folder: Path) -> None:
    """Give all in ``folder`` the modes that the umask allows: 0666 for files, 0777 for folders.

    Some libraries write files as 0600, whatever the umask says; who shares the store could not read
    them. Modes are only widened. Links, files with several names (one may be in somebody's model
    folder) and files of other users stay as they are.
    """
    mask = _umask()
    for path in (folder, *folder.rglob("*")):
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            wanted = 0o777 & ~mask
        elif stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
            wanted = 0o666 & ~mask
        else:
            continue
        if wanted & ~found.st_mode:
            with contextlib.suppress(PermissionError):
                path.chmod(stat.S_IMODE(found.st_mode) | wanted)


def sync_tree(folder: Path) -> None:
    """Force every file and folder under ``folder`` to the disk, several at a time."""
    sync_all(
        f"{at}/{name}" for at, folders, files in os.walk(folder) for name in (*folders, *files)
    )
    sync(folder)


def sync_all(paths: Iterable[Path | str]) -> None:
    """Force files and folders to the disk, in threads: most of the time is waiting."""
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(sync, paths):
            pass


def sync(path: Path | str) -> None:
    """Force one file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def files_below(folder: Path) -> Iterator[Path]:
    """Yield all under ``folder`` that is no folder, links included; no link is followed.

    A ``folder`` that is not there has nothing. Raises OSError for one that can't be listed.
    """
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from files_below(Path(entry.path))
            else:
                yield Path(entry.path)


def size_of(path: Path) -> int:
    """Count the bytes of a file, or of all files below a folder that can be seen."""
    total = 0
    with contextlib.suppress(OSError):
        total = 0 if path.is_dir() else path.lstat().st_size
        for file in files_below(path) if path.is_dir() else ():
            with contextlib.suppress(OSError):  # another process removed it meanwhile
                total += file.lstat().st_size
    return total


def kind(mode: int) -> str:
    """Say in words what a path with this ``st_mode`` is."""
    tests = {
        "a file": stat.S_ISREG,
        "a folder": stat.S_ISDIR,
        "a symbolic link": stat.S_ISLNK,
        "a named pipe": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
    }
    return next((name for name, test in tests.items() if test(mode)), "a device")


def writable(folder: Path) -> bool:
    """Tell whether this user can make files in ``folder``, or make it where it is missing."""
    for place in (folder, *folder.parents):
        if os.path.lexists(place):
            return place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    return False


def denied(path: Path, to: Literal["read", "write"] = "read") -> str:
    """Say whose a path is that this user may not read or write."""
    inside = [place for place in reversed(path.parents) if not os.access(place, os.X_OK)]
    there = [place for place in (path, *path.parents) if os.path.lexists(place)]
    if to == "write" and os.access(there[0], os.W_OK):
        there = there[1:]  # the folder that holds it can't be written
    barred = (inside or there)[0]  # what is in the way
    text = f"no permission to {to} {printable(path)}"
    with contextlib.suppress(OSError):
        owned, mode = whose(barred, path)
        text += (
            f": {owned} with the mode {mode & 0o7777:o}, and this process runs as "
            f"{user_name(os.geteuid())}"
        )
    return f"{text}. The owner can allow it (chmod {'a+rX' if to == 'read' else 'g+w'})"


def whose(barred: Path, path: Path) -> tuple[str, int]:
    """Say whose that is what bars the way to ``path``; and its mode. Raises OSError."""
    found = barred.stat()
    which = "it" if barred == path else printable(barred)
    return f"{which} belongs to {user_name(found.st_uid)}", found.st_mode


def printable(text: object) -> str:
    """Return ``text`` for a terminal: what is no valid UTF-8 in a file's name becomes an escape."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def user_name(uid: int) -> str:
    """Name a user; by the number if nobody knows the name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _umask() -> int:
    """Read the umask. Asking os.umask for it would change it for a moment, in all threads."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("Umask:")), 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
