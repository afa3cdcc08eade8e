"""Records of runs: ``<store>/runs/<time>/artifacts.json`` names the artifacts a run refers to."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from os import getuid
from pathlib import Path

from omegaconf import OmegaConf

from dirotq.errors import ArtifactError
from dirotq.files.digest import cache_root
from dirotq.pipeline.disk import writable, write_json
from dirotq.pipeline.manifest import DamagedError, read_json
from dirotq.pipeline.store import ArtifactStore

log = logging.getLogger(__name__)

RECORD = "artifacts.json"


@dataclass(frozen=True, slots=True)
class Needed:
    """What the last runs refer to.

    artifacts  by the records that can be read
    forgotten  what only older runs refer to
    damaged    records that can't be read, of all runs
    doubtful   those of the last runs among them: what no record names may be theirs
    """

    artifacts: frozenset[str]
    forgotten: frozenset[str]
    damaged: Sequence[Path]
    doubtful: Sequence[Path]

    def spares(self, name: str) -> bool:
        """Tell whether the artifact ``stage/fingerprint`` is needed, or may be."""
        return name in self.artifacts or (bool(self.doubtful) and name not in self.forgotten)


def folder_of(root: str | Path) -> Path:
    """Return where the runs on the store ``root`` keep their folders: ``<root>/runs``.

    For a store that can only be read it is in the cache, or where the system keeps such things.
    """
    places = [
        Path(root).absolute(),
        cache_root(),
        Path(tempfile.gettempdir(), f"dirotq-{getuid()}"),
    ]
    return next((p for p in places if writable(p / "runs")), places[0]) / "runs"


OmegaConf.register_new_resolver("runs_folder", lambda root: str(folder_of(root)), replace=True)
"""conf/config.yaml puts Hydra's folders there."""


def new_folder(store: ArtifactStore) -> Path:
    """Name a fresh folder in :func:`folder_of`, named for the time like Hydra's; not made yet."""
    return folder_of(store.root) / f"{datetime.now().astimezone():%Y-%m-%d_%H-%M-%S_%f}"


def record(folder: Path, store: ArtifactStore, artifacts: Mapping[str, str]) -> None:
    """Write down which artifacts a run refers to: {stage: "stage/fingerprint"}.

    Written before the run does anything, so that ``gc`` spares what an interrupted run made. A run
    folder outside of the store (hydra.run.dir=...) gets a second record inside of it, unless it can
    only be read (nobody collects in it then).
    """
    runs = store.root / "runs"
    folders = [folder] if folder.is_relative_to(runs) else [folder, new_folder(store)]
    if not writable(runs):
        log.info("the store %s can only be read: this run's folder is %s", store.root, folder)
        folders = [folder]
    for path in folders:
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / RECORD, artifacts, durable=True)


def needed(store: ArtifactStore, count: int) -> Needed:
    """Return the artifacts that the last ``count`` runs refer to (a multirun is one run).

    A record that can't be read never stops anybody: it is named, and as long as it is there and
    recent, what only it can refer to is spared.
    """
    runs: dict[str, list[Path]] = {}  # a run that failed before it knew its artifacts has no record
    for found in sorted((store.root / "runs").rglob(RECORD)):
        runs.setdefault(found.relative_to(store.root / "runs").parts[0], []).append(found)
    last = set(list(runs)[-count:] if count else [])
    names: dict[bool, set[str]] = {True: set(), False: set()}
    damaged: dict[bool, list[Path]] = {True: [], False: []}
    for run, records in runs.items():
        for path in records:
            try:
                names[run in last] |= _read(path)
            except ArtifactError:
                damaged[run in last].append(path)
    return Needed(
        artifacts=frozenset(names[True]),
        forgotten=frozenset(names[False] - names[True]),
        damaged=[*damaged[False], *damaged[True]],
        doubtful=damaged[True],
    )


def recorded(folder: Path) -> dict[Path, frozenset[str]]:
    """Return {record: the artifacts it names} of the run, or of the runs of a sweep, in ``folder``.

    Raises ArtifactError for a record that can't be read.
    """
    return {path: frozenset(_read(path)) for path in sorted(folder.rglob(RECORD))}


def leftovers(store: ArtifactStore) -> list[Path]:
    """List half-written records of processes that died."""
    return sorted((store.root / "runs").rglob(f".{RECORD}.*"))


def _read(path: Path) -> set[str]:
    names = list(read_json(path).values())
    if odd := [name for name in names if not isinstance(name, str)]:
        raise DamagedError(f"{path} is damaged: {odd[0]!r:.40} is no artifact")
    return set(names)
