"""What of DiRotQ's cache may go. It lies in :func:`dirotq.files.digest.cache_root`.

sources/<digest>/            a model of a single file or with LoRAs, which can be made again; its
                             modification time is when it was last used
sources/<digest>.lock        held by the process that makes it
sources/.<digest>-<random>/  what a process that died while making it left
plans/                       what `dirotq tune` measured: stays
runs/<time>/                 configuration and log of a run on a store that can only be read
"""

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dirotq.errors import ArtifactError
from dirotq.files.digest import cache_root
from dirotq.pipeline.disk import denied
from dirotq.pipeline.locks import InUseError

_NAME = re.compile(r"\.?(?P<digest>[0-9a-f]{32})(?P<draft>-.*)?")
_DAY = 24 * 60 * 60


def unused(days: int) -> Iterator[tuple[Path, str]]:
    """Yield (folder, why) of models and runs that were not used for ``days`` days, and of drafts.

    What is being made is passed over.
    """
    found = []
    for path in (*(cache_root() / "sources").glob("*"), *(cache_root() / "runs").glob("*")):
        with contextlib.suppress(OSError):
            if path.is_dir():
                found.append(((time.time() - path.lstat().st_mtime) / _DAY, path))
    for age, path in sorted(found, reverse=True):
        if path.parent.name == "runs" and age >= days:
            yield path, f"a run on a store that can only be read, {age:.0f} days ago"
        elif (named := _NAME.fullmatch(path.name)) and named["draft"]:
            with contextlib.suppress(Timeout, OSError), _lock(path):
                yield path, "left by a process that died"
        elif named and age >= days:
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


def _lock(path: Path) -> contextlib.AbstractContextManager[Any]:
    named = _NAME.fullmatch(path.name)
    if named is None:  # a run's folder
        return contextlib.nullcontext()
    return FileLock(path.with_name(f"{named['digest']}.lock"), timeout=0)
