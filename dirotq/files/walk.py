"""One walk through a folder that somebody brings: every file that would be read, through links.

What a loader opens by name it opens through links to files and folders. So what we count, copy or
hash has to be found the same way; ``Path.rglob`` does not enter linked folders.
"""

import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from dirotq.errors import ConfigError

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
VISITS = 64
"""How often one folder may be reached: a few links to each other make millions of paths."""


def walk(
    root: Path,
    *,
    skip: Callable[[Path], bool] = lambda _: False,
    check: Callable[[Path], None] = lambda _: None,
) -> list[Path]:
    """Return every file below ``root``, sorted; those in linked folders under the link's name.

    skip   says of a path that it is passed over, with all below it
    check  sees every link before it is followed, and may refuse it by a ConfigError

    Raises ConfigError for what can't be read to its end: a link that leads nowhere or back into a
    folder around it, a pipe, a socket, a device, a file or folder without permission. Below names
    that begin with a dot, which nobody reads, such things are passed over.
    """
    found: list[Path] = []
    visits: Counter[Path] = Counter()

    def enter(folder: Path, around: tuple[Path, ...], hidden: bool) -> None:
        real = folder.resolve()
        visits[real] += 1
        if folder.is_symlink() and any(above.is_relative_to(real) for above in around):
            raise ConfigError(
                f"{folder} is a link back to {real}, a folder around it. Remove the link"
            )
        if visits[real] > VISITS:
            raise ConfigError(
                f"{real} is reached on more than {VISITS} ways through links below {root}; remove "
                "those that nobody needs"
            )
        try:
            inside = sorted(folder.iterdir())
        except OSError as error:
            raise _unreadable(folder, error) from error
        for path in inside:
            if skip(path):
                continue
            secret = hidden or path.name[0] == "."
            try:
                if path.is_symlink():
                    check(path)
                if os.path.isdir(path):  # noqa: PTH112 (false without permission to look)
                    enter(path, (*around, real), secret)
                else:
                    found.append(readable(path))
            except ConfigError:
                if not secret:
                    raise

    enter(root, (), hidden=False)
    return found


def readable(path: Path) -> Path:
    """Return ``path`` if it is a plain file that may be read, through links; else ConfigError."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "no plain file")
        raise ConfigError(f"{path} is {kind}; only plain files are read here. Remove it")
    if not os.access(path, os.R_OK):
        raise _unreadable(path, PermissionError())
    return path


def _unreadable(path: Path, error: OSError) -> ConfigError:
    if isinstance(error, PermissionError):
        return ConfigError(
            f"{path} can't be read: this user has no permission. Allow it (chmod a+r FILE, chmod "
            "a+rx FOLDER), or run as the user it belongs to"
        )
    if path.is_symlink():
        return ConfigError(
            f"{path} is a link that leads nowhere ({path.readlink()}: "
            f"{error.strerror or error}). Bring back what it points to, or remove it; copy folders "
            "with `cp -rL`, which follows links"
        )
    return ConfigError(f"{path} can't be read: {error}")
