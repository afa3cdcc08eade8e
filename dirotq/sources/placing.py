"""Copies of other people's files that cost as little as their file system allows."""

import fcntl
import os
import shutil
from pathlib import Path

from dirotq.files.json_file import read_json
from dirotq.sources.blobs import is_blob
from dirotq.sources.folder import INDEX, carried_files

FICLONE = 0x40049409
"""ioctl of Linux: let a file share another one's blocks until one of them is written to."""


def place_rest(source: Path, target: Path) -> list[Path]:
    """Put all of a pipeline but its transformer below ``target``; return the files there.

    Links are resolved. No file is one that the source's owner may write to; all but weights are
    the caller's to change. Raises ConfigError for what can't be read, and OSError.
    """
    copies = []
    for path in carried_files(source, read_json(source / INDEX), without="transformer"):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            place(path, copy)
        else:
            shutil.copyfile(path, copy)
        copies.append(copy)
    return copies


def place(source: Path, target: Path) -> None:
    """Put the content of ``source``, through links, at ``target``, which does not exist yet.

    A blob of a Hugging Face cache, which nobody edits, may become a hard link. Any other file is
    its owner's to write to, and writing to a hard link changes all of them: it is cloned where the
    file system can (btrfs, XFS), else copied. Raises OSError.
    """
    real = source.resolve()
    if not (is_blob(real) and _linked(real, target)) and not _cloned(real, target):
        shutil.copyfile(real, target)


def _linked(real: Path, target: Path) -> bool:
    try:
        os.link(real, target)
    except OSError:  # another file system, or one without links
        return False
    return True


def _cloned(real: Path, target: Path) -> bool:
    with real.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new, FICLONE, old.fileno())
        except OSError:  # two file systems, or one that can't
            return False
    return True
