"""What a worker is told to make, and what it does then, wherever it runs."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from dirotq.errors import ArtifactError, UnsupportedError
from dirotq.pipeline import machine
from dirotq.pipeline.desk import Desk
from dirotq.pipeline.divided import Inputs, Make
from dirotq.pipeline.importing import no_collecting
from dirotq.pipeline.provenance import peaks, reset_peaks
from dirotq.pipeline.stage import recipe
from dirotq.pipeline.units import Units

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
Seen = dict[str, dict[str, tuple[int, ...]]]
"""{input: its files that were read, and what told each from any other}."""


@dataclass(frozen=True)
class Job:
    """Units of one stage: what a worker needs to make any of them. Two are equal by their token.

    known  the recipe of ``stage``, as it was planned
    names  all units that are left, of which a worker makes some
    desk   where a worker on another machine and the run's process hear of each other
    """

    token: str
    stage: Any = field(compare=False)
    known: Any = field(compare=False)
    out: Path = field(compare=False)
    names: tuple[str, ...] = field(compare=False)
    inputs: Inputs = field(compare=False)
    desk: Desk | None = field(compare=False, default=None)


@dataclass(frozen=True)
class Answer:
    """What a worker on another machine says when it has done what it could.

    error  what a unit raised, if anything
    peaks  the memory that it took so far
    """

    seen: Seen
    error: Exception | None
    peaks: dict[str, int]


def make_units(job: Job, names: Sequence[str]) -> Seen:
    """Make the named units and enter them in the journal: what a worker is for.

    Returns what it saw of its inputs that it did not tell before, for their last look.

    Raises ArtifactError if here the stage is not what was planned, UnsupportedError if a GPU is
    missing.
    """
    opened = _opened(job)
    units = Units.joined(job.out, job.stage, job.known)
    for _ in units.finishing(opened.make(names)):
        pass
    units.flush()
    return opened.news()


def answer(job: Job, names: Sequence[str]) -> Answer:
    """Make units at the run's desk. What goes wrong is part of the answer: if none comes, the
    worker died.
    """
    assert job.desk is not None
    with job.desk.seat():
        try:
            return Answer(make_units(job, names), None, peaks())
        except Exception as error:  # noqa: BLE001 - the run's process raises it
            return Answer({}, error, peaks())


def forget() -> dict[str, int]:
    """Let go of what was opened for a stage, and tell what memory that took."""
    taken = peaks()
    _opened.cache_clear()
    reset_peaks()
    return taken


def threads(count: int) -> dict[str, str]:
    """Return the environment variables of a process that computes on ``count`` cores.

    A number of threads that the environment gives already holds for each.
    """
    given = os.environ.get(THREADS[0], str(count))
    return {name: os.environ.get(name, given) for name in THREADS}


class _Opened:
    """What a worker made of its job, and the inputs that it reads."""

    def __init__(self, job: Job) -> None:
        self.make: Make = job.stage.maker(job.out, job.names, **job.inputs)
        self._inputs = job.inputs
        self._told: set[tuple[str, str]] = set()

    def news(self) -> Seen:
        found: Seen = {}
        for slot, artifact in self._inputs.items():
            new = {n: s for n, s in artifact.seen.items() if (slot, n) not in self._told}
            self._told.update((slot, name) for name in new)
            found[slot] = new
        return found


@lru_cache(1)
@no_collecting()
def _opened(job: Job) -> _Opened:
    if getattr(job.stage, "device", None) == "cuda" and not machine.find("cuda").gpu:
        raise UnsupportedError(
            f"a worker on {platform.node()} has no GPU that torch can use, and this run computes "
            "on GPUs: have its units made where there are some, or give device=cpu"
        )
    if recipe(job.stage) != job.known:
        raise ArtifactError(
            f"a worker on {platform.node()} reads another model or other prompts than those that "
            "were planned, or runs another version of DiRotQ. Leave them alone until the run ends; "
            "the same command plans anew"
        )
    return _Opened(job)
