"""What ``plan`` and ``compress`` print on stdout: one short table each."""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from rich.console import Console
from rich.table import Table

from dirotq.errors import ArtifactError
from dirotq.files.digest import cache_root
from dirotq.pipeline.config import Line
from dirotq.pipeline.cost import Cost
from dirotq.pipeline.dag import Outcome
from dirotq.pipeline.preflight import Preflight, free_disk
from dirotq.pipeline.store import Artifact

__all__ = ["bytes_text", "duration_text", "plan", "seconds_text", "summary"]


def plan(line: Line, found: Preflight) -> None:
    """Per stage: cached or to run, and what it took; of one to run, an estimate (``~``).

    A stage that can't be estimated shows what it took the last time it ran anywhere. Memory is the
    peak while the stage ran.
    """
    table = Table("stage", "state", "artifact", box=None, pad_edge=False)
    for name in ("seconds", "VRAM", "RAM", "disk"):
        table.add_column(name, justify="right")
    latest = {artifact.stage: artifact for artifact in line.store.list()}  # sorted by time
    missing: list[str] = []
    seconds: dict[str, float] = {}  # of the stages to run, where known
    for step in line.steps:
        cached = None if step.name in line.force else line.store.get(step.name, step.fingerprint)
        known = cached or latest.get(step.name)
        cells = ["-"] * 4
        if cached:
            cached.manifest  # noqa: B018 - a damaged one is no plan
        else:
            missing.append(step.name)
        if estimate := found.estimates.get(step.name):
            seconds[step.name] = estimate.cost.seconds
            cells = [f"~{text}" if text else "" for text in _cells(estimate.cost)]
        elif known and (took := _took(known)):
            cells = _cells(took)
            if not cached:
                seconds[step.name] = took.seconds
        table.add_row(step.name, "cached" if cached else "to run", step.fingerprint, *cells)
    if found.estimates:
        costs = [estimate.cost for estimate in found.estimates.values()]
        total = Cost(
            seconds=sum(cost.seconds for cost in costs),
            vram=max(cost.vram for cost in costs),
            ram=max(cost.ram for cost in costs),
            disk=sum(cost.disk for cost in costs),
        )
        table.add_row("in all", "", "", *(f"~{text}" if text else "" for text in _cells(total)))
    Console().print(table)
    print(f"\n{_outlook(missing, seconds, found, line.store.root)}")
    for note in found.notes:
        print(note)


def _took(artifact: Artifact) -> Cost | None:
    """What its provenance tells; None if that is lost, damaged or nonsense."""
    match artifact.provenance:
        case {"seconds": int() | float() as seconds, "peak_rss_bytes": int() as ram, **more}:
            vram: Any = more.get("peak_vram_bytes", 0)
            sane = 0 <= seconds < math.inf and isinstance(vram, int) and min(ram, vram) >= 0
            with contextlib.suppress(ArtifactError):  # another recipe's, removed or damaged
                if sane:
                    return Cost(seconds=seconds, vram=vram, ram=ram, disk=artifact.bytes)
    return None


def _cells(cost: Cost) -> list[str]:
    """Seconds, VRAM (empty for none), RAM, disk."""
    sizes = [bytes_text(cost.vram) if cost.vram else "", *map(bytes_text, (cost.ram, cost.disk))]
    return [seconds_text(cost.seconds), *sizes]


def _outlook(missing: list[str], seconds: Mapping[str, float], found: Preflight, root: Path) -> str:
    if not missing:
        return "everything is cached"
    new = [name for name in missing if name not in seconds]
    parts = [f"{len(missing)} to run"]
    if found.machine:
        parts.append(f"about {duration_text(sum(seconds.values()))} on {found.machine.name}")
        parts.append(f"{bytes_text(free_disk(root))} of disk free")
        if found.cache:
            parts.append(f"{bytes_text(found.cache)} more for the model in {cache_root()}")
    elif seconds:
        parts.append(f"about {seconds_text(sum(seconds.values()))} s, going by the last time")
    if new:
        parts.append(f"never run here: {', '.join(new)}")
    return "; ".join(parts)


def duration_text(seconds: float) -> str:
    """A time for people: 45 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def summary(outcomes: Mapping[str, Outcome], folder: Path) -> None:
    """Per stage: what happened and its metrics; then where to look."""
    table = Table("stage", "state", box=None, pad_edge=False)
    table.add_column("seconds", justify="right")
    table.add_column("metrics", overflow="fold")
    for name, outcome in outcomes.items():
        state = "cached" if outcome.seconds is None else "ran"
        seconds = seconds_text(outcome.seconds) if outcome.seconds is not None else ""
        table.add_row(name, state, seconds, metrics_text(outcome.artifact))
    Console().print(table)
    artifacts = [outcome.artifact for outcome in outcomes.values()]
    for what, path in [
        ("packed model", _holding(artifacts, "model_index.json", folder=True)),
        ("report", _holding(artifacts, "report.html")),
        ("judging", _holding(artifacts, "judge.html")),
        ("this run", folder),
    ]:
        if path:
            print(f"{what:<13}{path}")


def metrics_text(artifact: Artifact) -> str:
    """``psnr=47.3 sites=44``, in the order of the names."""
    return " ".join(f"{name}={value:.4g}" for name, value in sorted(artifact.metrics.items()))


def seconds_text(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 100 else f"{seconds:.0f}"


def bytes_text(count: float) -> str:
    """A size for people: 512 B, 3.1 MB."""
    if count < 1000:
        return f"{count:.0f} B"
    power = min(int(math.log10(count) / 3), 4)
    return f"{count / 1000**power:.1f} {' kMGT'[power]}B"


def _holding(artifacts: list[Artifact], name: str, *, folder: bool = False) -> Path | None:
    """The last artifact's file called ``name`` (the least deep one), or the folder it lies in."""
    for artifact in reversed(artifacts):
        found = [f for f in artifact.manifest["files"] if PurePosixPath(f).name == name]
        if found:
            path = Path(artifact.data, min(found, key=lambda file: file.count("/")))
            return path.parent if folder else path
    return None
