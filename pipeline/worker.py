"""Processes of this machine that make units.

Each sees one GPU if it was given one, takes its share of the processor's threads, sends what it
logs to the process that started it, leaves Ctrl-C to that one, and ends with it.
"""

import contextlib
import importlib
import logging
import logging.handlers
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

from dirotq.pipeline.importing import imported, no_collecting
from dirotq.pipeline.job import THREADS, Job, Seen, forget, make_units
from dirotq.pipeline.workplace import Share, few_at_a_time

T = TypeVar("T")
VISIBLE = "CUDA_VISIBLE_DEVICES"
IMPORTED = ("dirotq.stages.capture", "diffusers.pipelines.pipeline_utils")
"""What takes a process long to import: with them come torch, diffusers and transformers."""


class Processes:
    """``count`` processes, each a ``ProcessPoolExecutor`` of one, so that a process that dies is
    known together with the units it had.

    devices  GPUs for them, in turn: each sees one; None: they compute where the stage says
    early    processes that run already: those that were started alike are taken out of the list
    """

    no_start = (
        "worker processes end while they start; what they said stands above. A Python script that "
        "runs with executor.workers or executor.devices is imported by each of them: let it do its "
        'work under `if __name__ == "__main__":`'
    )
    patience = 0.0
    together = True

    def __init__(
        self,
        count: int,
        devices: Sequence[int] | None = None,
        early: list["Process"] | None = None,
    ) -> None:
        chosen = (
            [None] * count if devices is None else [devices[i % len(devices)] for i in range(count)]
        )
        settings = [environment(count, device) for device in chosen]
        self.workers: Sequence[Process] = [
            _taken(one, early or []) or Process(one) for one in settings
        ]
        self._devices = devices

    def send(self, job: Job, shares: Sequence[Share]) -> list[Future[Seen]]:
        """Have units made; a future raises BrokenExecutor if its process dies."""
        return [cast(Process, worker).make(job, names) for worker, names in shares]

    def helping(self, left: int, idle: int) -> int:
        return few_at_a_time(left, len(self.workers))

    def device(self, asked: str) -> str:
        return asked if self._devices is None else "cuda"  # the one that each sees

    def desk(self, out: Path) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()


class Process:
    """A process, started when it is first needed, and again after :meth:`stop`.

    settings  environment variables that it starts with
    """

    def __init__(self, settings: Mapping[str, str]) -> None:
        self.settings = settings
        self._level = logging.NOTSET
        self._pool: ProcessPoolExecutor | None = None
        self._pid: Future[int] | None = None
        self._child: multiprocessing.process.BaseProcess | None = None
        self._relay: threading.Thread | None = None

    @property
    def started(self) -> bool:
        """Whether the process that was started last got as far as doing what it is told."""
        return self._pid is not None and self._pid.done() and self._pid.exception() is None

    def start(self) -> None:
        """Begin to start the process, unless it runs; it logs what this one does."""
        before, self._level = self._level, logging.getLogger().getEffectiveLevel()
        if self._pool is not None:
            if self._level != before:
                self._submit(_log_from, self._level)
            return
        context = multiprocessing.get_context("spawn")  # CUDA and threads survive no fork
        reader, writer = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(1, context, _begin, (writer, self._level))
        others = multiprocessing.active_children()
        with environ(self.settings):
            self._pid = self._pool.submit(os.getpid)
        (self._child,) = (one for one in multiprocessing.active_children() if one not in others)
        writer.close()  # the worker's end is the only one now: it closes when that dies
        self._relay = threading.Thread(target=_relay, args=(reader,), daemon=True)
        self._relay.start()

    def prepare(self) -> None:
        """Have the process import what stages need, and open its GPU if it was given one."""
        self._submit(_prepare, VISIBLE in self.settings)  # what fails there fails again in a stage

    def make(self, job: Job, names: Sequence[str]) -> Future[Seen]:
        """Have units made; the future raises BrokenExecutor if the process dies."""
        self.start()
        return self._submit(make_units, job, list(names))

    def rest(self) -> Future[dict[str, int]]:
        """Have the process let go of what it opened for a stage, and tell what memory that took."""
        return self._submit(forget)

    def stop(self) -> None:
        """Kill the process if it lives. Nothing is lost: what it finished is on the disk."""
        if self._pool is None or self._child is None or self._relay is None:
            return
        self._child.kill()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._relay.join(timeout=1.0)  # its last words
        self._pool = self._pid = self._child = self._relay = None

    def _submit(self, function: Callable[..., T], *given: Any) -> Future[T]:
        failed: Future[T] = Future()
        if self._pool is None:
            failed.set_exception(BrokenExecutor("it was never started"))
            return failed
        try:
            return self._pool.submit(function, *given)
        except BrokenExecutor as error:  # it died since its last units
            failed.set_exception(error)
            return failed


def environment(count: int, device: int | None) -> dict[str, str]:
    """Return the environment variables of one of ``count`` workers, which sees only ``device``.

    A number of threads that the environment gives holds for each; else all cores are divided.
    """
    settings = {}
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        settings = dict.fromkeys(THREADS, str(max(cores // count, 1)))
    if device is not None:
        names = [name for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
        settings[VISIBLE] = names[device] if names else str(device)
    return settings


def _taken(settings: Mapping[str, str], early: list[Process]) -> Process | None:
    """Take a process that was started with these settings out of a list, if there is one."""
    found = next((one for one in early if one.settings == settings), None)
    if found is not None:
        early.remove(found)
    return found


def _begin(writer: Any, level: int) -> None:
    """Set up the process, before anything else is imported in it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it comes to all in a terminal; one answers
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    root = logging.getLogger()
    root.handlers = [_Sender(writer)]
    root.setLevel(level)


def _log_from(level: int) -> None:
    """Send records from this level on."""
    logging.getLogger().setLevel(level)


@no_collecting()
def _prepare(gpu: bool) -> None:
    """Import what stages need, and open the GPU that this process sees."""
    for name in IMPORTED:
        importlib.import_module(name)
    imported()
    if gpu:
        sys.modules["torch"].zeros(1, device="cuda")  # the core imports none by itself


def _end_with(sentinel: int) -> None:
    """End, at once, with the process that started this one: nobody else may write to the store."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


class _Sender(logging.handlers.QueueHandler):
    """Sends records through a pipe of this process alone: one that dies blocks no other."""

    def __init__(self, writer: Any) -> None:
        super().__init__(writer)
        self._writer = writer

    def enqueue(self, record: logging.LogRecord) -> None:
        self._writer.send(record)


def _relay(reader: Any) -> None:
    """Log here what a worker logs, until it ends."""
    with contextlib.suppress(EOFError, OSError), reader:
        while True:
            record = reader.recv()
            here = logging.getLogger(record.name)
            if here.isEnabledFor(record.levelno):
                here.handle(record)


@contextlib.contextmanager
def environ(settings: Mapping[str, str]) -> Iterator[None]:
    """Let processes that start in this block have these environment variables."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
