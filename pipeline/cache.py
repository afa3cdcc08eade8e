"""The cache of models that were put together (single files, LoRAs): what of it may go.

It lies in :func:`dirotq.digest.cache_root` and can be made again at any time:

    sources/<digest>/            a diffusers folder; its modification time is when it was last used
    sources/<digest>.lock        held by the process that makes it
    sources/.<digest>-<random>/  what a process that died while making it left
"""

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from dirotq.digest import cache_root
from dirotq.errors import ArtifactError
from dirotq.pipeline.disk import denied
from dirotq.pipeline.locks import InUseError

__all__ = ["remove", "unused"]

_NAME = re.compile(r"\.?(?P<digest>[0-9a-f]{32})(?P<draft>-.*)?")
_DAY = 24 * 60 * 60


def unused(days: int) -> Iterator[tuple[Path, str]]:
    """(folder, why) of models that were not used for ``days`` days, and of dead processes' drafts.

    A model that is being made is passed over.
    """
    found = []
    for path in (cache_root() / "sources").glob("*"):
        with contextlib.suppress(OSError):
            if _NAME.fullmatch(path.name) and path.is_dir():
                found.append((path.lstat().st_mtime, path))
    for used, path in sorted(found):
        age = (time.time() - used) / _DAY
        if path.name.startswith("."):
            with contextlib.suppress(Timeout, OSError), _lock(path):
                yield path, "left by a process that died"
        elif age >= days:
            yield path, f"a model in the cache, last used {age:.0f} days ago"


def remove(path: Path) -> None:
    """Remove one of these. Raises InUseError while it is made, ArtifactError if it can't be."""
    try:
        with _lock(path):
            shutil.rmtree(path)
    except Timeout as error:
        raise InUseError(f"{path} is being made by another process") from error
    except FileNotFoundError:
        pass  # another process removed it
    except PermissionError as error:
        raise ArtifactError(denied(Path(error.filename or path), "write")) from error
    except OSError as error:
        raise ArtifactError(f"{path} can't be removed: {error}") from error


def _lock(path: Path) -> FileLock:
    named = _NAME.fullmatch(path.name)
    assert named is not None
    return FileLock(path.with_name(f"{named['digest']}.lock"), timeout=0)
