"""How long a line takes with several workers, by the seconds that its units took before.

A simulation of pipeline/crew.py: it hands out units by the same rule. What a hand-out costs, and
that machines differ, it does not know.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from dirotq.pipeline.build import Pipeline
from dirotq.pipeline.history import Took, last_run_here, took
from dirotq.pipeline.preflight import Preflight
from dirotq.pipeline.workplace import few_at_a_time

Helping = Callable[[int, int], int]
"""Counts the units that one of so many idle workers is given of what is left: (left, idle)."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """One stage with several workers, in seconds.

    alone   in one process
    shared  with the workers
    rest    of that, what one process does: reading, merging, writing
    """

    units: int
    alone: float
    shared: float
    longest: float
    rest: float


def makespan(seconds: Sequence[float], workers: int, helping: Helping) -> float:
    """Simulate when the last of some units is made, of which workers are given some at a time."""
    free = [0.0] * min(workers, len(seconds))
    given, end = 0, 0.0
    while given < len(seconds):
        now = heapq.heappop(free)
        idle = 1 + sum(time <= now for time in free)
        count = helping(len(seconds) - given, idle)
        end = max(end, ready := now + sum(seconds[given : given + count]))
        heapq.heappush(free, ready)
        given += count
    return end


def forecast(past: Took, workers: int, helping: Helping) -> Forecast:
    """Say what a stage would take that once took ``past``.

    What its units then took together, beyond their own seconds, is taken for work that each worker
    does before its first, such as opening the model.
    """

    def helped(left: int, idle: int) -> int:
        return few_at_a_time(left, past.workers)

    before = makespan(past.units, past.workers, helped) if past.workers > 1 else sum(past.units)
    rest = past.seconds - past.wall + max(past.wall - before, 0.0)
    return Forecast(
        units=len(past.units),
        alone=rest + sum(past.units),
        shared=rest + makespan(past.units, workers, helping),
        longest=max(past.units, default=0.0),
        rest=rest,
    )


def show(pipeline: Pipeline, found: Preflight) -> None:
    """Print per stage how far workers help; nothing for a run without any.

    Of all stages if none is to run.
    """
    workers = pipeline.executor.processes
    if not workers:
        return
    machine = found.machine.name if found.machine else None
    past = pipeline.store.list()
    told: dict[str, Forecast | None] = {}
    for step in pipeline.todo() or pipeline.steps:
        cached = pipeline.cached(step)
        known = took(cached) if cached else last_run_here(step, past, machine)
        helping = pipeline.executor.helping
        told[step.name] = forecast(known, workers, helping) if known else None
    table = Table("stage", box=None, pad_edge=False)
    for name in ("units", "one process", f"{workers} workers", "longest unit", "not shared out"):
        table.add_column(name, justify="right")
    for name, one in told.items():
        table.add_row(name, *_cells(one))
    print()
    Console().print(table)
    print(f"\n{_sum(told, workers)}")


def _cells(one: Forecast | None) -> list[str]:
    if one is None:
        return ["-"] * 5
    units = (str(one.units), f"{one.longest:.2f}") if one.units else ("", "")
    alone, shared, rest = (f"{seconds:.1f}" for seconds in (one.alone, one.shared, one.rest))
    return [units[0], alone, shared, units[1], rest]


def _sum(told: dict[str, Forecast | None], workers: int) -> str:
    known = {name: one for name, one in told.items() if one}
    if not known:
        return f"no stage has run here before: what {workers} workers would gain is not known"
    alone, shared = (sum(getattr(f, of) for f in known.values()) for of in ("alone", "shared"))
    # Stages follow each other: what remains with any number of workers.
    path = {name: one.rest + one.longest for name, one in known.items()}
    most = sorted(path, key=lambda name: -path[name])[:3]
    parts = ", ".join(f"{name} {path[name]:.1f}" for name in most)
    return (
        f"seconds by the units' times of the last runs: {alone:.1f} in one process, {shared:.1f} "
        f"with {workers} workers, at least {sum(path.values()):.1f} with any number ({parts})"
    )
