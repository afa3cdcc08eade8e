"""Workers that start while a command still reads its settings and its model.

A process takes as long to import torch and diffusers as the command itself. Started when a stage
first has units for it, it would come that much later to its first one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from dirotq.pipeline.worker import Process, Processes

_STARTED: ContextVar[list[Process] | None] = ContextVar("started", default=None)


@contextmanager
def block() -> Iterator[None]:
    """Let processes be started early in this block. Those that no run took end with it."""
    started: list[Process] = []
    token = _STARTED.set(started)
    try:
        yield
    finally:
        _STARTED.reset(token)
        for process in started:
            process.stop()


def start(processes: Processes) -> None:
    """Begin to start them, and have them import what stages need; nothing outside of a block."""
    started = _STARTED.get()
    if started is None:
        return
    for process in processes.workers:
        process.start()
        started.append(process)
    for process in processes.workers:
        process.prepare()


def started() -> list[Process]:
    """Return the processes of this block that no run took yet; whoever takes one removes it."""
    found = _STARTED.get()
    return [] if found is None else found
