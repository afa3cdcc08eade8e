"""Measure shape after shape: each is kept as soon as it is known, and what fails is passed over."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dirotq.kernels.measured import Entry
from dirotq.kernels.plan import Plan, name_of

from .fastest import Shape, Timed, entries, plans, race

Kinds = dict[str, list[Entry]]
"""{kind of linear: rows}."""
Measure = Callable[[Shape, Sequence[Plan], Callable[[Plan, str], object]], Timed]


@dataclass(slots=True)
class Outcome:
    """How many shapes were ``measured``, are ``left``, or have no plan that runs (``without``);
    and the plans that ``failed`` somewhere, with the first reason."""

    measured: int = 0
    left: int = 0
    without: int = 0
    failed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        left = f", {self.left} left" if self.left else ""
        none = f", {self.without} without a kernel that runs" if self.without else ""
        skipped = f"; {len(self.failed)} kernels skipped" if self.failed else ""
        return f"{self.measured} shapes measured{left}{none}{skipped}"


def measure(
    shapes: Sequence[Shape],
    chip: int,
    *,
    keep: Callable[[Shape, list[Entry]], object],
    deadline: float,
    say: Callable[[str], object],
    by: Measure = race,
) -> Outcome:
    """Time the plans of every shape until the deadline (``time.monotonic``).

    keep  takes a shape's rows as soon as they are known
    say   takes a line per shape, and one per plan that fails
    """
    begin, outcome = time.monotonic(), Outcome()

    def failed(plan: Plan, why: str) -> None:
        name = name_of(plan)
        if name not in outcome.failed:
            outcome.failed[name] = why
            say(f"{shape}: skipped {name}: {why}")

    for done, shape in enumerate(shapes):
        if (now := time.monotonic()) > deadline:
            outcome.left = len(shapes) - done
            break
        left = f", {_clock((now - begin) / done * (len(shapes) - done))} left" if done else ""
        timed = []
        try:
            if candidates := plans(shape, chip):
                timed = by(shape, candidates, failed)
        except torch.OutOfMemoryError:
            say(f"{shape}: the GPU's memory does not hold it")
        said = "no kernel runs it"
        if timed:
            keep(shape, entries(shape, timed))
            said = "; then ".join(f"{t.p50:.1f} us {name_of(plan)}" for plan, t in timed[:2])
        outcome.measured += bool(timed)
        outcome.without += not timed
        say(f"[{done + 1}/{len(shapes)}{left}] {shape}: {said}")
    return outcome


def merged(kinds: Mapping[str, list[Entry]], shape: Shape, rows: Sequence[Entry]) -> Kinds:
    """Put a shape's rows in place of those that the table has of it."""
    kind, m, n, k = shape.key
    kept = [r for r in kinds.get(kind, []) if (r["m"], r["n"], r["k"]) != (m, n, k)]
    after = {name: list(old) for name, old in kinds.items()} | {kind: [*kept, *rows]}
    after[kind].sort(key=lambda row: (row["k"], row["n"], row["m"]))  # stable: fastest first
    return after


def missing(shapes: Sequence[Shape], kinds: Mapping[str, list[Entry]]) -> list[Shape]:
    """Return the shapes that a table has no row of."""
    known = {(kind, r["m"], r["n"], r["k"]) for kind, rows in kinds.items() for r in rows}
    return [shape for shape in shapes if shape.key not in known]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
