"""A place on any fsspec URL: objects are read and written whole, and again where that failed.

Nothing is taken from a listing but names to choose from. On a store of objects a written object is
there whole or not at all; a file of a file system gets its name when it is whole.
"""

import hashlib
import logging
import random
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dirotq.errors import ArtifactError
from dirotq.pipeline.remote_errors import explained, lasting, no_bucket, unopened
from dirotq.pipeline.secrecy import refuse_secrets

log = logging.getLogger(__name__)
T = TypeVar("T")
Does = Literal["read", "written", "removed"]

ATTEMPTS = 7
PAUSE = 0.1
"""Seconds before the second attempt; each one after it waits twice as long. Seven end after 6 s."""
PIECE = 16 << 20
"""Bytes that are asked for at a time; a cut connection costs at most these."""
SMALL = 256 << 20
"""Bytes of the largest object that is read into memory: manifests, of many files."""
_S3: Mapping[str, Any] = {
    "max_concurrency": 8,  # parts of one large file at a time, 50 MB each
    "config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 3}},
}
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "file": {"auto_mkdir": True}, "local": {"auto_mkdir": True}, "s3": _S3, "s3a": _S3
}  # fmt: skip


class Remote:
    """What lies below one URL; names are relative to it. Safe for several threads."""

    def __init__(self, url: str) -> None:
        """Open it; nothing is asked of the server yet.

        Raises ArtifactError for what is no URL, an unknown protocol, or one whose package is not
        here (it is named); ConfigError for a URL with a password.
        """
        refuse_secrets([url])
        protocol, found, rest = url.partition("://")
        if not found or not rest.strip("/"):
            raise ArtifactError(
                f"{url!r} is no URL of a remote store: write s3://BUCKET/PREFIX, gs://..., or "
                "file:///FOLDER for a folder"
            )
        self.url = url.rstrip("/")
        options = OPTIONS.get(protocol, {})
        try:
            self._fs, root = fsspec.url_to_fs(self.url, skip_instance_cache=True, **options)
        except Exception as error:  # whatever a protocol's package raises
            raise unopened(error, self.url) from error
        self._root = root.rstrip("/")
        self._renames = isinstance(self._fs, LocalFileSystem)

    def __reduce__(self) -> tuple[Any, ...]:
        return Remote, (self.url,)  # connections stay in their process

    def __str__(self) -> str:
        return self.url

    def read(self, name: str) -> bytes | None:
        """Return a small object, or None if there is none. Raises ArtifactError, of a bucket that
        is missing too."""
        get: Callable[[], bytes] = partial(self._fs.cat_file, self._path(name), start=0, end=SMALL)
        try:
            return self._tried("read", name, get)
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a small object, in the place of an older one."""
        self._put(name, lambda path: self._fs.pipe_file(path, data))

    def send(self, file: Path, name: str) -> None:
        """Copy a local file there, in the place of an older one."""
        self._put(name, lambda path: self._fs.put_file(str(file), path))

    def fetch(self, name: str, file: Path, size: int) -> str | None:
        """Copy ``size`` bytes here, behind what ``file`` has already; the SHA-256 of all of it.

        Returns None if there is no such object.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+b") as out:
            out.seek(0)
            digest = hashlib.file_digest(out, "sha256")
            while (done := out.seek(0, 2)) < size:
                end = min(done + PIECE, size)
                get = partial(self._fs.cat_file, self._path(name), start=done, end=end)
                try:
                    piece = self._tried("read", name, get)
                except FileNotFoundError:
                    return None
                if not piece:  # it is shorter than it should be
                    break
                out.write(piece)
                digest.update(piece)
        return str(digest.hexdigest())

    def size(self, name: str) -> int | None:
        """Return the bytes of an object; None if there is none."""
        try:
            found = self._tried("read", name, lambda: self._fs.info(self._path(name)))
        except FileNotFoundError:
            return None
        return None if found.get("size") is None else int(found["size"])

    def names(self, folder: str = "") -> list[str]:
        """List what is right below a folder. It may be late, and is no proof of anything."""
        listed = partial(self._fs.ls, self._path(folder), detail=False)
        try:
            return sorted(PurePosixPath(path).name for path in self._tried("read", folder, listed))
        except FileNotFoundError:
            return []

    def remove(self, name: str) -> None:
        """Remove one object, if it is there."""
        with suppress(FileNotFoundError):
            self._tried("removed", name, lambda: self._fs.rm_file(self._path(name)))

    def tidy(self, name: str) -> None:
        """Remove one object that nobody needs any more, if that is allowed."""
        try:
            self._fs.rm_file(self._path(name))
        except Exception as error:  # noqa: BLE001 - it may be gone, or not be ours to remove
            log.debug("%s/%s stays: %s", self.url, name, error)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _put(self, name: str, put: Callable[[str], None]) -> None:
        path = self._path(name)

        def whole() -> None:
            if not self._renames:
                put(path)
                return
            scratch = f"{path}.{uuid.uuid4().hex[:8]}.part"
            try:
                put(scratch)
                self._fs.mv(scratch, path)
            except BaseException:
                with suppress(OSError):
                    self._fs.rm_file(scratch)
                raise

        self._tried("written", name, whole)

    def _tried(self, does: Does, name: str, call: Callable[[], T]) -> T:
        """Return what ``call`` returns, after some attempts if it must be.

        Raises FileNotFoundError if what is to be read or removed is not there, ArtifactError for
        all else. Where something is written, another process may just have removed its folder.
        """
        where = f"{self.url}/{name}"
        for tries in range(1, ATTEMPTS + 1):
            try:
                return call()
            except Exception as error:  # whatever a protocol's package raises
                absent = isinstance(error, FileNotFoundError) and not no_bucket(error)
                if absent and does != "written":
                    raise
                if lasting(error) or tries == ATTEMPTS:
                    raise explained(error, does, where, tries) from error
                level = logging.INFO if tries > 2 else logging.DEBUG  # one or two are nothing
                log.log(level, "%s, attempt %d of %d: %s", where, tries, ATTEMPTS, error)
            time.sleep(PAUSE * 2 ** (tries - 1) * random.uniform(0.5, 1))
        raise AssertionError
