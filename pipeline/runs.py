"""Records of runs: ``<store>/runs/<time>/artifacts.json`` names the artifacts a run refers to."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

from dirotq.pipeline.artifact import read_json
from dirotq.pipeline.store import ArtifactStore

__all__ = ["new_folder", "recent", "record"]

RECORD = "artifacts.json"


def new_folder(store: ArtifactStore) -> Path:
    """A fresh folder under ``<store>/runs``, named for the time like Hydra's."""
    now = time.time()
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(now))
    return store.root / "runs" / f"{stamp}_{int(now % 1 * 1e6):06d}"


def record(folder: Path, store: ArtifactStore, artifacts: Mapping[str, str]) -> None:
    """Write down which artifacts a run refers to: {stage: "stage/fingerprint"}.

    Written before the run does anything, so that ``gc`` spares what an interrupted run made. A run
    folder outside of the store (hydra.run.dir=...) gets a second record inside of it.
    """
    runs = store.root / "runs"
    folders = [folder] if folder.is_relative_to(runs) else [folder, new_folder(store)]
    for path in folders:
        path.mkdir(parents=True, exist_ok=True)
        (path / RECORD).write_text(json.dumps(artifacts, indent=2) + "\n")


def recent(store: ArtifactStore, count: int) -> set[str]:
    """The artifacts that the last ``count`` runs refer to (a multirun is one run)."""
    runs: dict[str, list[Path]] = {}  # a run that failed before it knew its artifacts has no record
    for found in sorted((store.root / "runs").rglob(RECORD)):
        runs.setdefault(found.relative_to(store.root / "runs").parts[0], []).append(found)
    last = list(runs.values())[-count:] if count else []
    return {name for run in last for found in run for name in read_json(found).values()}
