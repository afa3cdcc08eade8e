"""What the processes that make units have in common, wherever they run: here, on Ray, on SLURM."""

import contextlib
import logging
import re
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future
from pathlib import Path
from typing import Protocol

from dirotq.pipeline.desk import Desk
from dirotq.pipeline.job import Answer, Job, Seen
from dirotq.pipeline.units import JOURNAL

MOST = 8
"""Units given out at once: a worker reads one while it computes another, and hashes a third."""
LATE = 60.0
"""Seconds after which a file that another machine wrote shows on a network file system."""


class Worker(Protocol):
    """One process at a time, started when it is first needed, and again after ``stop``.

    started  whether the last one got as far as doing what it is told
    start    begin to start it, unless it runs
    rest     have it let go of what it opened for a stage; the future has the memory that took
    stop     end it if it lives, and return when it writes no more
    """

    @property
    def started(self) -> bool: ...
    def start(self) -> None: ...
    def rest(self) -> Future[dict[str, int]]: ...
    def stop(self) -> None: ...


Share = tuple[Worker, Sequence[str]]
"""A worker and the units that it is to make."""


class Workplace(Protocol):
    """Where jobs run.

    workers   as many processes as may work at the same time
    no_start  what to say if they end while they start
    patience  seconds to wait for files of a unit that is told to be finished
    together  whether all workers run at the same time, on one machine

    ``send`` has units made by idle workers; a future raises BrokenExecutor if its process dies,
    and what a unit raises. ``helping`` counts the units that one of ``idle`` workers is given of
    ``left``. ``device`` is what the workers' stages compute on. ``desk`` is for the workers of one
    stage, which is made in ``out``. ``close`` stops whatever runs.
    """

    no_start: str
    patience: float
    together: bool

    @property
    def workers(self) -> Sequence[Worker]: ...
    def send(self, job: Job, shares: Sequence[Share]) -> list[Future[Seen]]: ...
    def helping(self, left: int, idle: int) -> int: ...
    def device(self, asked: str) -> str: ...
    def desk(self, out: Path) -> contextlib.AbstractContextManager[Desk | None]: ...
    def close(self) -> None: ...


class LostError(BrokenExecutor):
    """A worker on another machine died, for the reason that the cluster gives."""


def few_at_a_time(left: int, workers: int) -> int:
    """Count the units that one of several workers is given: fewer towards the end."""
    return max(1, min(MOST, left // (2 * workers)))


def shared_desk(out: Path) -> contextlib.AbstractContextManager[Desk]:
    """Open a desk in the journal of ``out``: whoever opens that anew removes what is left of it."""
    folder = out / JOURNAL / f"desk-{uuid.uuid4().hex[:8]}"
    return Desk(folder, logging.getLogger().getEffectiveLevel()).open()


def settle(future: Future[Seen], ask: Callable[[], Answer]) -> dict[str, int]:
    """Give a future what ``ask`` returns or raises; return the peaks of memory."""
    try:
        found = ask()
    except Exception as error:  # noqa: BLE001 - whatever a cluster raises, no answer came
        future.set_exception(LostError(_reason(error)))
        return {}
    if found.error is not None:
        future.set_exception(found.error)
    else:
        future.set_result(found.seen)
    return found.peaks


def _reason(error: Exception) -> str:
    """Return what matters of a page with a traceback or a log: the error, else the end."""
    text = str(error) or repr(error)
    named = re.findall(r"^[\w.]*(?:Error|Exception)\b.*$", text, re.MULTILINE)
    return " ".join((named[-1] if named else text).split())[-300:]
