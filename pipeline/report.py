"""What ``plan`` and ``compress`` print on stdout: one short table each."""

import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.table import Table

from dirotq.pipeline.config import Line
from dirotq.pipeline.dag import Outcome
from dirotq.pipeline.store import Artifact

__all__ = ["bytes_text", "plan", "seconds_text", "summary"]


def plan(line: Line) -> None:
    """Per stage: cached or to run, and what it took the last time this stage ran anywhere.

    Memory is the peak of the process that ran the stage, up to its end.
    """
    table = Table("stage", "state", "artifact", box=None, pad_edge=False)
    for name in ("seconds", "memory", "disk"):
        table.add_column(name, justify="right")
    latest = {artifact.stage: artifact for artifact in line.store.list()}  # sorted by time
    missing: list[str] = []
    cost: dict[str, float] = {}  # seconds of the stages to run, where known
    for step in line.steps:
        cached = None if step.name in line.force else line.store.get(step.name, step.fingerprint)
        known = cached or latest.get(step.name)
        past = known.provenance if known else {}
        if not cached:
            missing.append(step.name)
            if known:
                cost[step.name] = past["seconds"]
        table.add_row(
            step.name,
            "cached" if cached else "to run",
            step.fingerprint,
            seconds_text(past["seconds"]) if known else "-",
            bytes_text(past["peak_rss_bytes"]) if known else "-",
            bytes_text(known.bytes) if known else "-",
        )
    Console().print(table)
    print(f"\n{_outlook(missing, cost)}")


def _outlook(missing: list[str], cost: Mapping[str, float]) -> str:
    if not missing:
        return "everything is cached"
    new = [name for name in missing if name not in cost]
    parts = [f"{len(missing)} to run"]
    if cost:
        parts.append(f"about {seconds_text(sum(cost.values()))} s, going by the last time")
    if new:
        parts.append(f"never run here: {', '.join(new)}")
    return "; ".join(parts)


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
