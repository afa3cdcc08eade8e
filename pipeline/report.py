"""What ``plan`` prints on stdout, and the two lines at the end of ``compress``."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from dirotq.files.digest import cache_root
from dirotq.pipeline.build import Pipeline
from dirotq.pipeline.dag import Outcome
from dirotq.pipeline.history import Took, last_run_here, took
from dirotq.pipeline.machine import Needs
from dirotq.pipeline.preflight import Preflight, free_disk
from dirotq.pipeline.store import Artifact

HEADLINE = {
    "psnr": "PSNR {:.1f} dB",
    "bits_per_parameter": "{:.2f} bits per parameter",
    "compression": "{:.1f} times smaller",
}
"""Metrics that are told at the end of a run, in words."""


def plan(pipeline: Pipeline, found: Preflight) -> None:
    """Print per stage: cached, to run or to pull; of a cached one, what it took; of one to run, the
    seconds of its last run here, and what it needs: an estimate (``~``) or an upper bound (``<``).

    Without a workload, what that run took; of one to pull, its size. Memory is the peak.
    """
    table = Table("stage", "state", "artifact", box=None, pad_edge=False)
    for name in ("seconds", "VRAM", "RAM", "disk"):
        table.add_column(name, justify="right")
    past = last_times(pipeline, found)
    for step in pipeline.steps:
        cached = pipeline.cached(step)
        if cached:
            cached.manifest  # noqa: B018 - a damaged one is no plan
        known = took(cached) if cached else past.get(step.name)
        estimate = found.estimates.get(step.name)
        cells = _cells(known, estimate.needs if estimate else None)
        state = "cached" if cached else "to run"
        if (size := pipeline.remote.get(step.name)) is not None:
            state, cells = "to pull", ["-", "", "", decimal(size)]
        table.add_row(step.name, state, step.fingerprint, *cells)
    Console().print(table)
    print(f"\n{outlook(pipeline, found)}")
    for note in (*found.notes, *found.work):
        print(note)


def last_times(pipeline: Pipeline, found: Preflight) -> dict[str, Took | None]:
    """Return {stage to run: what its last run on this machine took, None without one}."""
    todo = pipeline.todo()
    past = pipeline.store.list() if todo else []  # sorted by time
    machine = found.machine.name if found.machine else None
    return {step.name: last_run_here(step, past, machine) for step in todo}


def outlook(pipeline: Pipeline, found: Preflight) -> str:
    """Say in a line what there is to run, what it writes, and how long it took the last time."""
    times = last_times(pipeline, found)
    pulls = f"{len(pipeline.remote)} to pull, {decimal(sum(pipeline.remote.values()))}"
    if not times:
        return pulls if pipeline.remote else "everything is cached"
    new = [name for name, took in times.items() if took is None]
    seconds = [took.seconds for took in times.values() if took is not None]
    parts = [f"{len(times)} to run"]
    if found.machine:
        root = pipeline.store.root
        parts[0] += f" on {found.machine.name}"
        written = sum(estimate.needs.disk for estimate in found.estimates.values())
        parts.append(f"~{decimal(int(written))} to write, {decimal(free_disk(root))} of disk free")
        if found.cache:
            parts.append(f"{decimal(found.cache)} more for the model in {cache_root()}")
    if pipeline.remote:
        parts.append(pulls)
    if seconds:
        parts.append(f"about {duration_text(sum(seconds))}, going by the last time")
    if new:
        parts.append(f"never run here: {', '.join(new)}")
    return "; ".join(parts)


def _cells(known: Took | None, needs: Needs | None) -> list[str]:
    """Seconds, VRAM (empty for none), RAM, disk."""
    seconds = seconds_text(known.seconds) if known else "-"
    if needs:
        mark = "<" if needs.bound else "~"
        told = ((mark, needs.vram), (mark, needs.ram), ("~", needs.disk))
        return [seconds, *(f"{mark}{decimal(int(n))}" if n else "" for mark, n in told)]
    if known:
        vram = decimal(known.vram) if known.vram else ""
        return [seconds, vram, decimal(known.ram), decimal(known.disk)]
    return ["-"] * 4


def duration_text(seconds: float) -> str:
    """Write a time for people: 45 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def summary(outcomes: Mapping[str, Outcome], folder: Path, *, verbose: bool = False) -> None:
    """Print where the packed model and the report are, with the scores that matter most.

    verbose  before that, what happened per stage and all its metrics
    """
    if verbose:
        _all_metrics(outcomes)
    artifacts = [outcome.artifact for outcome in outcomes.values()]
    scores: dict[str, float] = {}
    for artifact in artifacts:
        scores |= artifact.metrics
    told = [words.format(scores[name]) for name, words in HEADLINE.items() if name in scores]
    places = [
        ("packed model", holding(artifacts, "model_index.json", folder=True), ""),
        ("report", holding(artifacts, "report.html"), f" ({', '.join(told)})" if told else ""),
        ("judging", holding(artifacts, "judge.html"), ""),
    ]
    if not any(path for _, path, _ in places):  # stopped before (until=STAGE)
        places.append((artifacts[-1].stage, artifacts[-1].data, ""))
    if verbose:
        places.append(("this run", folder, ""))
    for what, path, more in places:
        if path:
            print(f"{what:<13}{path}{more}")


def _all_metrics(outcomes: Mapping[str, Outcome]) -> None:
    table = Table("stage", "state", box=None, pad_edge=False)
    table.add_column("seconds", justify="right")
    table.add_column("metrics", overflow="fold")
    for name, outcome in outcomes.items():
        state = "cached" if outcome.seconds is None else "ran"
        seconds = seconds_text(outcome.seconds) if outcome.seconds is not None else ""
        metrics = sorted(outcome.artifact.metrics.items())
        table.add_row(name, state, seconds, " ".join(f"{k}={v:.4g}" for k, v in metrics))
    Console().print(table)


def seconds_text(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 100 else f"{seconds:.0f}"


def holding(artifacts: list[Artifact], name: str, *, folder: bool = False) -> Path | None:
    """Return the last artifact's file ``name`` (the least deep one), or the folder it lies in."""
    for artifact in reversed(artifacts):
        found = [f for f in artifact.manifest["files"] if PurePosixPath(f).name == name]
        if found:
            path = Path(artifact.data, min(found, key=lambda file: file.count("/")))
            return path.parent if folder else path
    return None
