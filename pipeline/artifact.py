"""One finished stage result, and how its bytes are held against its manifest."""

import functools
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dirotq.digest import file_digest
from dirotq.errors import ArtifactError

__all__ = ["MANIFEST", "SCHEMA", "Artifact", "inventory", "read_json", "refuse_newer"]

SCHEMA = 1  # of manifest.json and of the store's marker; newer ones are refused
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """An immutable folder ``<store>/<stage>/<fingerprint>``; its manifest says it is complete.

    Nothing is read past its digest: ``file`` and ``tree`` compare what they return with the sha256
    in the manifest, once per process (again only if its size or modification time changed).
    """

    stage: str
    fingerprint: str
    path: Path

    def __str__(self) -> str:
        return f"{self.stage}/{self.fingerprint}"

    @property
    def data(self) -> Path:
        """The folder of the result files, unchecked. Prefer ``file`` and ``tree``."""
        return self.path / "data"

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        """schema, stage, fingerprint, recipe, files {path: {sha256, bytes}}, metrics."""
        manifest = read_json(self.path / MANIFEST)
        refuse_newer(manifest, self.path / MANIFEST)
        return manifest

    @property
    def metrics(self) -> dict[str, float]:
        """The scalars the stage returned (infinities and nan are stored as strings)."""
        return {name: float(value) for name, value in self.manifest["metrics"].items()}

    @property
    def provenance(self) -> dict[str, Any]:
        """Who made it, when, where, with what; never part of its identity."""
        return read_json(self.path / "provenance.json")

    @property
    def bytes(self) -> int:
        """Size of all result files."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    def file(self, name: str) -> Path:
        """The result file ``name`` (relative to data/), its digest checked.

        Raises ArtifactError if there is no such file, or if a byte of it changed.
        """
        if name not in self.manifest["files"]:
            raise ArtifactError(f"{self} has no file {name!r}; it has {self._listing()}")
        self._check([name])
        return self.data / name

    def tree(self, name: str) -> Path:
        """The result folder ``name`` (a Zarr store, a model), every file in it checked.

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

    def _check(self, names: Iterable[str]) -> None:
        def problem(name: str) -> str | None:
            path, want = self.data / name, self.manifest["files"][name]
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                return f"{name} is missing"
            if size != want["bytes"]:
                return f"{name} has {size} bytes instead of {want['bytes']}"
            if file_digest(path) != want["sha256"]:
                return f"{name} changed after it was written (its sha256 differs)"
            return None

        with ThreadPoolExecutor() as pool:  # hashing releases the GIL; a Zarr tree is many files
            self._raise_damaged(next(filter(None, pool.map(problem, names)), None))

    def _refuse_strangers(self, folder: Path, names: Iterable[str]) -> None:
        strangers = set(_names(folder, self.data)) - set(names)
        self._raise_damaged(f"{min(strangers)} was not written by the stage" if strangers else None)

    def _raise_damaged(self, problem: str | None) -> None:
        if problem:
            raise ArtifactError(
                f"artifact {self} is damaged: {problem}. Remove it with `dirotq verify --remove "
                f"{self}`, or recompute it with force=[{self.stage}]. Its folder is {self.path}"
            )

    def _listing(self) -> str:
        tops = sorted({name.split("/")[0] for name in self.manifest["files"]})
        return ", ".join(tops) or "no files at all"


def inventory(data: Path) -> dict[str, dict[str, Any]]:
    """{relative path: {sha256, bytes}} of every file under ``data``."""

    def entry(name: str) -> dict[str, Any]:
        path = data / name
        return {"sha256": file_digest(path), "bytes": path.stat().st_size}

    names = _names(data, data)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(entry, names), strict=True))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises ArtifactError if it is absent or no JSON object."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist; the artifact was removed meanwhile") from error
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: no valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} is damaged: expected a JSON object, found {value!r:.40}")
    return value


def refuse_newer(content: dict[str, Any], path: Path) -> None:
    """Raise ArtifactError if ``content`` states a schema that this version cannot read."""
    schema = content.get("schema")
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ArtifactError(
            f"{path} has schema {schema}, and this DiRotQ reads up to {SCHEMA}: a newer version "
            "wrote it. Upgrade DiRotQ, or use another store (store=FOLDER, or the environment "
            "variable DIROTQ_STORE)"
        )


def _names(folder: Path, data: Path) -> list[str]:
    return sorted(p.relative_to(data).as_posix() for p in folder.rglob("*") if not p.is_dir())
