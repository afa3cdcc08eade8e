"""Records of runs: ``<store>/runs/<time>/artifacts.json`` names the artifacts a run refers to."""

import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dirotq.errors import ArtifactError
from dirotq.pipeline.disk import writable, write_json
from dirotq.pipeline.manifest import DamagedError, read_json
from dirotq.pipeline.store import ArtifactStore

__all__ = ["Needed", "leftovers", "needed", "new_folder", "record"]

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
        """Whether the artifact ``stage/fingerprint`` is needed, or may be."""
        return name in self.artifacts or (bool(self.doubtful) and name not in self.forgotten)


def new_folder(store: ArtifactStore) -> Path:
    """A fresh folder under ``<store>/runs``, named for the time like Hydra's.

    It is not made yet. For a store that can only be read it is one elsewhere, and a line in the log
    says where.
    """
    now = time.time()
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(now))
    name = f"{stamp}_{int(now % 1 * 1e6):06d}"
    if writable(store.root / "runs"):
        return store.root / "runs" / name
    elsewhere = Path(tempfile.mkdtemp(prefix="dirotq-run-")) / name
    log.warning("the store %s can only be read: this run's folder is %s", store.root, elsewhere)
    return elsewhere


def record(folder: Path, store: ArtifactStore, artifacts: Mapping[str, str]) -> None:
    """Write down which artifacts a run refers to: {stage: "stage/fingerprint"}.

    Written before the run does anything, so that ``gc`` spares what an interrupted run made. A run
    folder outside of the store (hydra.run.dir=...) gets a second record inside of it, if it can be
    written (where it can't, nobody collects in it either).
    """
    runs = store.root / "runs"
    folders = [folder]
    if not folder.is_relative_to(runs) and writable(runs):
        folders.append(new_folder(store))
    for path in folders:
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / RECORD, artifacts)


def needed(store: ArtifactStore, count: int) -> Needed:
    """The artifacts that the last ``count`` runs refer to (a multirun is one run).

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


def leftovers(store: ArtifactStore) -> list[Path]:
    """Half-written records of processes that died."""
    return sorted((store.root / "runs").rglob(f".{RECORD}.*"))


def _read(path: Path) -> set[str]:
    names = list(read_json(path).values())
    if odd := [name for name in names if not isinstance(name, str)]:
        raise DamagedError(f"{path} is damaged: {odd[0]!r:.40} is no artifact")
    return set(names)
