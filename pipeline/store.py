"""The artifact store: one folder per (stage, fingerprint), complete or absent.

    <root>/dirotq-store.json                 marker: the schema of everything below
    <root>/<stage>/<fingerprint>/            manifest.json, provenance.json, data/
    <root>/<stage>/<fingerprint>.partial/    work in progress, or what an interrupted run left
    <root>/<stage>/<fingerprint>.pull/       the same of a copy from a remote store
    <root>/.locks/  <root>/runs/             one lock file per key; one folder per run

All access to artifacts goes through this module and pipeline/artifact.py. Roots are local folders;
what is missing is pulled from a remote store, if one stands beside (pipeline/remote_store.py).
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

from dirotq.errors import ArtifactError
from dirotq.pipeline import locks
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.disk import (
    denied,
    is_disk_full,
    open_modes,
    scratch_of,
    sync,
    sync_tree,
    write_json,
)
from dirotq.pipeline.manifest import (
    MANIFEST,
    SCHEMA,
    DamagedError,
    answers_to,
    inventory,
    read_json,
    refuse_newer,
    sealed,
)
from dirotq.pipeline.place import MARKER, REMOTE_MARKER, store_place
from dirotq.pipeline.provenance import provenance, reset_peaks
from dirotq.pipeline.remote_store import RemoteStore
from dirotq.pipeline.stage import fingerprint
from dirotq.pipeline.units import refuse_changed, retire, times

__all__ = ["Artifact", "ArtifactStore", "Draft", "default_root"]

log = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{16}")


@dataclass
class Draft:
    """What ``ArtifactStore.create`` hands out.

    data      folder to write into
    metrics   scalars to fill in for the manifest
    artifact  None while there is work to do; otherwise the published result (another process may
              have finished the same key while this one waited for its lock)
    source    whose work that result is
    """

    data: Path
    metrics: dict[str, float] = field(default_factory=dict)
    artifact: Artifact | None = None
    source: str = "another process"


class ArtifactStore:
    """Artifacts under one local folder; safe for several processes at a time."""

    def __init__(self, root: str | Path, remote: RemoteStore | None = None) -> None:
        """Open the store; a missing folder is created by the first artifact.

        remote  ``create`` pulls from there what is missing here

        Raises ArtifactError for a URL or a remote store's folder, or if a newer DiRotQ wrote it.
        """
        if "://" in str(root):
            raise ArtifactError(
                f"store {root} is a URL, and stages read local files. Give a folder, and the URL "
                f"beside it: store_remote={root}"
            )
        self.root = store_place(root)
        self.remote = remote
        if os.path.lexists(self.root / REMOTE_MARKER):
            raise ArtifactError(
                f"{self.root} is a remote store, which `dirotq push` filled: its layout is another "
                f"one. Give a folder as the store, and beside it store_remote=file://{self.root}"
            )
        self._marked()

    def get(self, stage: str, key: str) -> Artifact | None:
        """Return the published artifact of this stage and fingerprint, or None."""
        artifact = Artifact(stage, key, self.root / stage / key)
        return artifact if artifact.published else None

    def find(self, name: str) -> Artifact:
        """Find the artifact ``stage/fingerprint``; either part, or a beginning, may be enough.

        Raises ArtifactError if none or several match.
        """
        stage, _, key = name.rpartition("/")
        found = [
            artifact
            for artifact in self.everything()
            if (artifact.fingerprint.startswith(key) and stage in ("", artifact.stage))
            or artifact.stage == name
        ]
        if len(found) == 1:
            return found[0]
        known = ", ".join(map(str, found or self.list()))
        what = "several artifacts match" if found else "no artifact matches"
        rest = f": it is one of {known}" if known else ", where there are none"
        if name.count("/") > 1 or name.startswith((".", "~")):
            rest += " (an artifact is named STAGE/FINGERPRINT, not by a path)"
        raise ArtifactError(f"{what} {name!r} in {self.root}{rest}")

    def list(self) -> list[Artifact]:
        """List every published artifact that may be read, by stage and time of publication."""
        found = []
        for artifact in self.everything():
            with contextlib.suppress(ArtifactError):
                found += [artifact] if artifact.published else []
        return found

    def everything(self) -> Sequence[Artifact]:
        """List all that is named like an artifact, published or damaged, in ``list``'s order."""
        paths = [path for path in self._entries() if _KEY.fullmatch(path.name)]
        paths.sort(key=lambda path: (path.parent.name, _time(path)))
        return [Artifact(path.parent.name, path.name, path) for path in paths]

    @contextlib.contextmanager
    def reading(self, stage: str, key: str) -> Iterator[Artifact | None]:
        """Yield the published artifact, or None; nobody replaces or removes it in the block.

        Waits for a process that is making it.
        """
        with contextlib.suppress(OSError):  # a store that can only be read
            (self.root / locks.FOLDER).mkdir(exist_ok=True)
        artifact = Artifact(stage, key, self.root / stage / key)
        with artifact.held() as there:
            yield artifact if there else None

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
        force       recompute and replace an artifact that exists, once nobody reads it any more
        overrides   the command line's, for provenance.json
        notes       more entries of provenance.json

        An error leaves nothing published and the partial folder in place.
        Raises ArtifactError if the store cannot be written or the disk is full.
        """
        key = fingerprint(recipe)
        final, partial = self.root / stage / key, self.root / stage / f"{key}.partial"
        with self._disk_full_explained(stage, key), self._making(final):
            draft = Draft(partial / "data")
            if not force:
                draft.artifact = self.get(stage, key)
                if not draft.artifact and (pulled := self._pulled(stage, key)):
                    draft.artifact, draft.source = pulled, str(self.remote)
                if draft.artifact:
                    yield draft
                    return
            with self._unwritable_explained():
                self._prepare(partial, resume)
            resumed = any(draft.data.iterdir())
            started = time.time()
            reset_peaks()
            yield draft
            files = inventory(draft.data)
            refuse_changed(draft.data, files)
            manifest = {
                "schema": SCHEMA,
                "stage": stage,
                "fingerprint": key,
                "recipe": recipe,
                "files": files,
                "metrics": {name: _jsonable(value) for name, value in draft.metrics.items()},
            }
            made = provenance(started, overrides) | {"resumed": resumed} | dict(notes or {})
            made |= times(draft.data)
            write_json(partial / "provenance.json", made)
            write_json(partial / MANIFEST, sealed(manifest))
            draft.artifact = self._published(partial, final)

    def pull(self, stage: str, key: str) -> Artifact | None:
        """Copy an artifact from the remote store, unless it is here; None if it is not there.

        Raises ArtifactError for damage there, or if it can't be read there or written here.
        """
        with self._disk_full_explained(stage, key), self._making(self.root / stage / key):
            return self.get(stage, key) or self._pulled(stage, key)

    def verify(self, artifact: Artifact) -> None:
        """Hold an artifact against its name and its manifest.

        Raises DamagedError if it is not what its name says, or a file differs; another
        ArtifactError if that can't be told.
        """
        if not answers_to(artifact.manifest, artifact.stage, artifact.fingerprint):
            raise DamagedError(
                f"artifact {artifact} is damaged: its recipe does not hash to its folder's name. "
                f"Remove it with `dirotq verify --remove {artifact}`"
            )
        artifact.check()

    def remove(self, path: Path) -> None:
        """Discard an artifact, or what dead processes left.

        Raises InUseError if a living process reads it or works on it, ArtifactError if it can't be
        removed.
        """
        try:
            with contextlib.suppress(OSError):
                (self.root / locks.FOLDER).mkdir(exist_ok=True)
            keyed = _KEY.fullmatch(path.name.split(".")[0])
            lock = locks.alone(path, wait=False, remove=True) if keyed else contextlib.nullcontext()
            with lock:
                self.discard(path)
        except OSError as error:
            raise ArtifactError(f"{path} can't be removed: {_reason(error)}") from error

    def discard(self, path: Path) -> None:
        """Remove a folder of the store so that no reader ever sees half of it.

        Of a link only the link goes: what it leads to may be anybody's.
        """
        if path.is_symlink():
            log.warning("%s is a link to %s: the link goes, its end stays", path, path.readlink())
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            trash = path.with_name(f"{path.name}.trash-{uuid.uuid4().hex[:8]}")
            path.replace(trash)
            shutil.rmtree(trash)
        elif os.path.lexists(path):  # a pipe, a socket
            path.unlink()

    def leftovers(self) -> Iterator[Path]:
        """Yield what dead processes left: partial and half-removed folders, scratch files."""
        for path in sorted(self._entries()):
            key, dot, _ = path.name.partition(".")
            if dot and _KEY.fullmatch(key) and not locks.is_held(path):
                yield path
        yield from sorted(scratch_of(self.root, MARKER))

    def _entries(self) -> Iterator[Path]:
        """Yield what lies in the folders of the stages."""
        for stage in _inside(self.root):
            if stage.is_dir() and not stage.name.startswith("."):
                yield from _inside(stage)

    def _marked(self) -> bool:
        """Tell whether the marker is there and whole. Raises ArtifactError for a newer store."""
        marker = self.root / MARKER
        if not os.path.lexists(marker):
            return False
        try:
            content = read_json(marker)
        except DamagedError as error:  # as a power cut leaves it: every manifest has a schema too
            log.warning("%s; it will be written anew", error)
            return False
        refuse_newer(content, marker)
        return type(content.get("schema")) is int

    def _pulled(self, stage: str, key: str) -> Artifact | None:
        """Pull what is missing here, under its lock."""
        final, folder = self.root / stage / key, self.root / stage / f"{key}.pull"
        if self.remote is None or self.remote.fill(stage, key, folder) is None:
            return None
        return self._published(folder, final)

    def _published(self, folder: Path, final: Path) -> Artifact:
        """Give a folder that is complete its name, whole and on disk."""
        open_modes(folder)
        sync_tree(folder)
        retire(folder / "data")  # last: killed before, the run finds its units again
        self.discard(final)  # there only under force, or damaged
        folder.replace(final)
        for above in (final.parent, self.root):
            sync(above)
        return Artifact(final.parent.name, final.name, final)

    def _prepare(self, partial: Path, resume: bool) -> None:
        """Make the draft's folder, with nothing but ``data`` in it, and that only to ``resume``.

        What a process that was killed while it removed something left of this key goes too.
        """
        for trash in partial.parent.glob(f"{partial.stem}.*trash-*"):
            shutil.rmtree(trash)
        if not resume:
            self.discard(partial)
        for path in _inside(partial):
            if path.name != "data" or path.is_symlink() or not path.is_dir():
                self.discard(path)
        (partial / "data").mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _making(self, final: Path) -> Iterator[None]:
        """Hold an artifact's lock alone, in a store that exists."""
        with contextlib.ExitStack() as held:
            with self._unwritable_explained():
                for folder in (final.parent, self.root / locks.FOLDER):
                    folder.mkdir(parents=True, exist_ok=True)
                if not self._marked():
                    write_json(self.root / MARKER, {"schema": SCHEMA}, durable=True)
                held.enter_context(locks.alone(final))
            yield

    @contextlib.contextmanager
    def _unwritable_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if is_disk_full(error):
                raise
            raise ArtifactError(
                f"the store {self.root} cannot be written: {_reason(error)}. Choose another one "
                "with store=FOLDER or the environment variable DIROTQ_STORE"
            ) from error

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
    """Return the store of a command that names none: DIROTQ_STORE, or ``artifacts`` here."""
    return os.environ.get("DIROTQ_STORE", "artifacts")


def _jsonable(value: float) -> float | str:
    number = float(value)
    return number if abs(number) < float("inf") else str(number)


def _inside(folder: Path) -> list[Path]:
    """List what is in a folder; nothing if it is none, with a warning if it may not be seen."""
    try:
        return list(folder.iterdir())
    except PermissionError:
        log.warning("%s", denied(folder))
    except (FileNotFoundError, NotADirectoryError):
        pass
    return []


def _time(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:  # another process removed it meanwhile
        return 0.0


def _reason(error: OSError) -> str:
    if isinstance(error, PermissionError) and error.filename:
        return denied(Path(error.filename), "write")
    return str(error)
