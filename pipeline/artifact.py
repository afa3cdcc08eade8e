"""One finished stage result, and how its bytes are held against its manifest."""

import contextlib
import functools
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dirotq.errors import ArtifactError
from dirotq.files.digest import file_digest
from dirotq.pipeline import locks
from dirotq.pipeline.disk import denied, kind, printable
from dirotq.pipeline.manifest import (
    MANIFEST,
    DamagedError,
    is_file,
    names_below,
    read_json,
    read_manifest,
)


@dataclass(frozen=True)
class Artifact:
    """An immutable folder ``<store>/<stage>/<fingerprint>``; its manifest says it is complete.

    Nothing is read past its digest: ``file`` and ``tree`` compare what they return with the sha256
    in the manifest, once per process (again only if its size, times or inode changed).
    """

    stage: str
    fingerprint: str
    path: Path

    def __str__(self) -> str:
        return f"{self.stage}/{self.fingerprint}"

    @property
    def data(self) -> Path:
        """The folder of the result files, unchecked: read through ``file`` and ``tree``."""
        return self.path / "data"

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        """schema, stage, fingerprint, recipe, files {path: {sha256, bytes}}, metrics.

        Raises DamagedError for one of another shape (:func:`manifest.read_manifest`).
        """
        try:
            return read_manifest(self.path / MANIFEST)
        except DamagedError as error:
            raise self._damaged(self._misplaced() or str(error)) from error

    @property
    def published(self) -> bool:
        """Whether there is such an artifact. Raises ArtifactError if that may not be seen."""
        return is_file(self.path / MANIFEST)

    @property
    def metrics(self) -> dict[str, float]:
        """The scalars the stage returned (infinities and nan are stored as strings)."""
        return {name: float(value) for name, value in self.manifest["metrics"].items()}

    @property
    def provenance(self) -> dict[str, Any]:
        """Who made it, when, where, with what; empty if that is lost. Nothing may depend on it."""
        try:
            return read_json(self.path / "provenance.json")
        except ArtifactError:
            return {}

    @property
    def bytes(self) -> int:
        """Size of all result files."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    @contextlib.contextmanager
    def held(self, *, wait: bool = True) -> Iterator[bool]:
        """Keep other processes from replacing or removing it until the block ends.

        yields  whether it is there
        wait    for a process that is making or replacing it; without it InUseError is raised
        """
        with locks.shared(self.path, wait=wait):
            yield self.published

    def file(self, name: str) -> Path:
        """Return the result file ``name`` (relative to data/), its digest checked.

        Raises ArtifactError if there is no such file, or if a byte of it changed.
        """
        if name not in self.manifest["files"]:
            raise ArtifactError(f"{self} has no file {name!r}; it has {self._listing()}")
        self._check([name])
        return self.data / name

    def tree(self, name: str) -> Path:
        """Return the result folder ``name`` (a Zarr store, a model), every file in it checked.

        Raises ArtifactError if there is no such folder, or if a file in it is missing (Zarr would
        read zeros and say nothing), changed, or was not written by the stage.
        """
        prefix = f"{name}/"
        names = [file for file in self.manifest["files"] if file.startswith(prefix)]
        if not names:
            raise ArtifactError(f"{self} has no folder {name!r}; it has {self._listing()}")
        self._check(names)
        self._refuse_strangers(self.data / name, names)
        return self.data / name

    def check(self) -> None:
        """Check every file. Raises ArtifactError naming the first one that differs."""
        self._check(self.manifest["files"])
        self._refuse_strangers(self.data, self.manifest["files"])

    def recheck(self) -> None:
        """Check what ``file`` and ``tree`` handed out once more, as lazy readers read it since.

        It costs a look at the files' times where nothing changed. Raises what ``file`` raises.
        """
        self._check([name for name, stamp in self._seen.items() if stamp != self._stamp(name)])

    @property
    def seen(self) -> Mapping[str, tuple[int, ...]]:
        """{file: what told it from any other when its digest was right}, of what was handed out."""
        return self._seen

    def saw(self, elsewhere: Mapping[str, tuple[int, ...]]) -> None:
        """Add what another process has ``seen``: ``recheck`` looks at it too."""
        # A disk that machines share has a number of its own on each.
        device = self.data.lstat().st_dev
        for name, stamp in elsewhere.items():
            self._seen.setdefault(name, (*stamp[:-1], device))

    @functools.cached_property
    def _seen(self) -> dict[str, tuple[int, ...]]:
        return {}

    def _stamp(self, name: str) -> tuple[int, ...] | None:
        """Return what tells a file from any other that was ever there; None if there is no file."""
        try:
            found = (self.data / name).lstat()
        except FileNotFoundError:
            return None
        times = (found.st_mtime_ns, found.st_ctime_ns)
        return found.st_mode, found.st_size, *times, found.st_ino, found.st_dev

    def _check(self, names: Iterable[str]) -> None:
        seen = self._seen

        def problem(name: str) -> str | None:
            path, want = self.data / name, self.manifest["files"][name]
            try:
                if (stamp := self._stamp(name)) is None:
                    return f"{name} is missing"
                mode, size, *_ = stamp
                if not stat.S_ISREG(mode):
                    return f"{name} is {kind(mode)}, not a file"
                if size != want["bytes"]:
                    return f"{name} has {size} bytes instead of {want['bytes']}"
                if seen.get(name) != stamp and file_digest(path) != want["sha256"]:
                    return f"{name} changed after it was written (its sha256 differs)"
            except FileNotFoundError:
                return f"{name} is missing"
            except PermissionError as error:
                raise ArtifactError(denied(path)) from error
            except OSError as error:
                return f"{name} can't be read: {error.strerror}"
            seen[name] = stamp
            return None

        if len(asked := list(names)) == 1:
            self._raise_damaged(problem(*asked))
            return
        with ThreadPoolExecutor() as pool:  # hashing releases the GIL; a Zarr tree is many files
            self._raise_damaged(next(filter(None, pool.map(problem, asked)), None))

    def _refuse_strangers(self, folder: Path, names: Iterable[str]) -> None:
        try:
            strangers = set(names_below(folder, self.data)) - set(names)
        except PermissionError as error:
            raise ArtifactError(denied(Path(error.filename))) from error
        self._raise_damaged(f"{min(strangers)} was not written by the stage" if strangers else None)

    def _raise_damaged(self, problem: str | None) -> None:
        if problem:
            raise self._damaged(problem)

    def _damaged(self, problem: str) -> DamagedError:
        return DamagedError(
            f"artifact {self} is damaged: {printable(problem)}. Remove it with `dirotq verify "
            f"--remove {self}`, or recompute it with force=[{self.stage}]. Its folder is "
            f"{self.path}"
        )

    def _misplaced(self) -> str | None:
        """Say what is wrong with the folder itself, where no manifest can be read in it."""
        if self.path.is_dir():
            return None
        if self.path.is_symlink():
            return f"it is a link to {self.path.readlink()}, where there is no folder"
        return "it is no folder" if os.path.lexists(self.path) else "it was removed meanwhile"

    def _listing(self) -> str:
        tops = sorted({name.split("/")[0] for name in self.manifest["files"]})
        return ", ".join(tops) or "no files at all"
