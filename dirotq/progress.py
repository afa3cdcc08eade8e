"""Progress of long loops: a bar with an ETA on a terminal, plain log lines everywhere else."""

import functools
import logging
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
log = logging.getLogger(__name__)

QUIET_SECONDS = 2.0  # shorter work says nothing at all
LINE_SECONDS = 5.0  # between two plain lines


def begin(what: str) -> None:
    """Say at once, on stderr, what a verb does first: what comes next may take seconds."""
    if sys.stderr is not None:
        print(f"{what} ...", file=sys.stderr, flush=True)


def track(items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
    """Yield ``items``, reporting how far the loop has come and how long it will take.

    total   number of items, taken from ``len(items)`` where that exists; unknown means no ETA

    Nothing is shown during the first two seconds. After that: a rich bar if stderr is a terminal,
    otherwise one log line every few seconds and a final one.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    alone = multiprocessing.parent_process() is None  # bars of several would write over each other
    show = _bar if _console().is_terminal and alone else _lines
    yield from show(items, description, total)


def log_handler() -> logging.Handler:
    """Make Hydra's console handler: log lines and bars share one terminal without clashing."""
    if _console().is_terminal:
        return RichHandler(console=_console(), show_path=False, show_level=False, markup=False)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%H:%M:%S"))
    return handler


@contextmanager
def told(logger: str) -> Iterator[None]:
    """Show what a logger of ours says, from INFO on, while a verb runs."""
    log, handler = logging.getLogger(logger), log_handler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


@functools.cache
def _console() -> Console:
    return Console(stderr=True)


def _bar(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    progress = Progress(*columns, console=_console(), transient=True)
    task = progress.add_task(description, total=total)
    # A timer, not a look at the clock between items: the first item alone may take minutes.
    show = threading.Timer(QUIET_SECONDS, progress.start)
    show.daemon = True
    show.start()
    try:
        for item in items:
            yield item
            progress.advance(task)
    finally:
        show.cancel()
        show.join()
        progress.stop()


def _lines(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    began = spoke = time.monotonic()
    of = f"/{total}" if total else ""
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - began > QUIET_SECONDS and now - spoke > LINE_SECONDS and done != total:
            left = f", {_clock((now - began) / done * (total - done))} left" if total else ""
            log.info("%s %d%s%s", description, done, of, left)
            spoke = now
    if (seconds := time.monotonic() - began) > QUIET_SECONDS:
        log.info("%s %d%s in %s", description, done, of, _clock(seconds))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
