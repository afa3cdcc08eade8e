"""The artifact store: one folder per (stage, fingerprint), complete or absent.

    <root>/dirotq-store.json                 marker: the schema of everything below
    <root>/<stage>/<fingerprint>/            manifest.json, provenance.json, data/
    <root>/<stage>/<fingerprint>.partial/    work in progress, or what an interrupted run left
    <root>/.locks/  <root>/runs/             one lock file per key; one folder per run

All access to artifacts goes through this module and pipeline/artifact.py (docs/adr: roots are
local folders for now).
"""

import contextlib
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dirotq.errors import ArtifactError
from dirotq.pipeline.artifact import MANIFEST, SCHEMA, Artifact, inventory, read_json, refuse_newer
from dirotq.pipeline.disk import is_disk_full, sync, sync_tree, write_json
from dirotq.pipeline.peaks import reset_peaks
from dirotq.pipeline.provenance import provenance
from dirotq.pipeline.stage import fingerprint

__all__ = ["Artifact", "ArtifactStore", "Draft", "default_root"]

log = logging.getLogger(__name__)

MARKER = "dirotq-store.json"
_KEY = re.compile(r"[0-9a-f]{16}")


@dataclass
class Draft:
    """What ``ArtifactStore.create`` hands out.

    data      folder to write into
    metrics   scalars to fill in for the manifest
    artifact  None while there is work to do; otherwise the published result (another process may
              have finished the same key while this one waited for its lock)
    """

    data: Path
    metrics: dict[str, float] = field(default_factory=dict)
    artifact: Artifact | None = None


class ArtifactStore:
    """Artifacts under one local folder; safe for several processes at a time."""

    def __init__(self, root: str | Path) -> None:
        """Open the store; a missing folder is created by the first artifact.

        Raises ArtifactError for a URL, or if a newer DiRotQ wrote the store.
        """
        if "://" in str(root):
            raise ArtifactError(f"store {root} is a URL; only local folders work as a store so far")
        self.root = Path(root).absolute()
        if (marker := self.root / MARKER).exists():
            refuse_newer(read_json(marker), marker)

    def get(self, stage: str, key: str) -> Artifact | None:
        """The published artifact of this stage and fingerprint, or None."""
        path = self.root / stage / key
        return Artifact(stage, key, path) if (path / MANIFEST).is_file() else None

    def find(self, name: str) -> Artifact:
        """The artifact called ``stage/fingerprint``; either part, or a beginning, may be enough.

        Raises ArtifactError if none or several match.
        """
        stage, _, key = name.rpartition("/")
        found = [
            artifact
            for artifact in self.list()
            if (artifact.fingerprint.startswith(key) and stage in ("", artifact.stage))
            or artifact.stage == name
        ]
        if len(found) == 1:
            return found[0]
        known = ", ".join(map(str, found or self.list())) or "nothing"
        what = "several artifacts match" if found else "no artifact matches"
        raise ArtifactError(f"{what} {name!r} in {self.root}: it is one of {known}")

    def list(self) -> list[Artifact]:
        """Every published artifact, by stage and time of publication."""
        paths = [
            p.parent for p in self.root.glob(f"*/*/{MANIFEST}") if _KEY.fullmatch(p.parent.name)
        ]
        paths.sort(key=lambda path: (path.parent.name, path.stat().st_mtime))
        return [Artifact(path.parent.name, path.name, path) for path in paths]

    @contextlib.contextmanager
    def create(
        self,
        stage: str,
        recipe: Mapping[str, Any],
        *,
        resume: bool = False,
        force: bool = False,
        overrides: Sequence[str] = (),
        notes: Mapping[str, Any] | None = None,
    ) -> Iterator[Draft]:
        """Yield a draft and publish it, whole and on disk, when the block ends without an error.

        resume      keep what an interrupted run left in the draft's folder
        force       recompute and replace an artifact that exists
        overrides   the command line's, for provenance.json
        notes       more entries of provenance.json

        An error leaves nothing published and the partial folder in place.
        Raises ArtifactError if the store cannot be written or the disk is full.
        """
        key = fingerprint(recipe)
        final, partial = self.root / stage / key, self.root / stage / f"{key}.partial"
        with self._lock(stage, key), self._disk_full_explained(stage, key):
            draft = Draft(partial / "data")
            if not force and (published := self.get(stage, key)):
                draft.artifact = published
                yield draft
                return
            if not resume:
                self.discard(partial)
            draft.data.mkdir(parents=True, exist_ok=True)
            started = time.time()
            reset_peaks()
            yield draft
            manifest = {
                "schema": SCHEMA,
                "stage": stage,
                "fingerprint": key,
                "recipe": recipe,
                "files": inventory(draft.data),
                "metrics": {name: _jsonable(value) for name, value in draft.metrics.items()},
            }
            made = provenance(started, overrides) | dict(notes or {})
            write_json(partial / "provenance.json", made)
            write_json(partial / MANIFEST, manifest)
            sync_tree(partial)
            self.discard(final)  # there only under force
            partial.replace(final)
            sync(final.parent)
            draft.artifact = Artifact(stage, key, final)

    def verify(self, artifact: Artifact) -> None:
        """Hold an artifact against its name and its manifest.

        Raises ArtifactError if the recipe does not hash to the folder's name, or a file differs.
        """
        if fingerprint(artifact.manifest["recipe"]) != artifact.fingerprint:
            raise ArtifactError(
                f"artifact {artifact} is damaged: its recipe does not hash to its folder's name. "
                f"Remove it with `dirotq verify --remove {artifact}`"
            )
        artifact.check()

    def discard(self, path: Path) -> None:
        """Remove a folder of the store so that no reader ever sees half of it."""
        if path.exists():
            trash = path.with_name(f"{path.name}.trash-{uuid.uuid4().hex[:8]}")
            path.replace(trash)
            shutil.rmtree(trash)

    def leftovers(self) -> Iterator[Path]:
        """Partial and half-removed folders that no living process works on."""
        for path in sorted(self.root.glob("*/*.*")):
            key = path.name.split(".")[0]
            if path.is_dir() and path.parent.name[0] != "." and _KEY.fullmatch(key):
                with (
                    contextlib.suppress(Timeout),
                    self._file_lock(path.parent.name, key).acquire(0),
                ):
                    yield path

    @contextlib.contextmanager
    def _lock(self, stage: str, key: str) -> Iterator[None]:
        try:
            (self.root / stage).mkdir(parents=True, exist_ok=True)
            (self.root / ".locks").mkdir(exist_ok=True)
            if not (marker := self.root / MARKER).exists():
                write_json(marker, {"schema": SCHEMA})
            lock = self._file_lock(stage, key)
            lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for another process that is computing %s/%s", stage, key)
            lock.acquire()
        except OSError as error:
            raise ArtifactError(
                f"the store {self.root} cannot be written: {error}. Choose another one with "
                "store=FOLDER or the environment variable DIROTQ_STORE"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _file_lock(self, stage: str, key: str) -> FileLock:
        return FileLock(self.root / ".locks" / f"{stage}-{key}.lock")

    @contextlib.contextmanager
    def _disk_full_explained(self, stage: str, key: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not is_disk_full(error):
                raise
            free = shutil.disk_usage(self.root).free
            raise ArtifactError(
                f"the disk is full: writing {stage}/{key} failed with {free:,} bytes free at the "
                f"store {self.root}. Finished work and the partial folder are kept; make room "
                "(`dirotq gc` lists what may go), then the same command resumes"
            ) from error


def default_root() -> str:
    """The store of a command that names none: DIROTQ_STORE, or ``artifacts`` in this folder."""
    return os.environ.get("DIROTQ_STORE", "artifacts")


def _jsonable(value: float) -> float | str:
    number = float(value)
    return number if abs(number) < float("inf") else str(number)
