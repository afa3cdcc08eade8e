"""Copies of other people's files that cost as little as their file system allows."""

import fcntl
import os
import shutil
from pathlib import Path

from dirotq.sources.blobs import is_blob

FICLONE = 0x40049409
"""ioctl of Linux: let a file share another one's blocks until one of them is written to."""


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
