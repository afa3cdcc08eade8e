"""Processes of this machine that share out the units of a stage.

Each is a ``ProcessPoolExecutor`` of one, so that a process that dies is known together with the
units it had. It writes a unit's files and its entry in the journal itself; what it finished counts,
however it ends, and whatever it was told.
"""

import contextlib
import dataclasses
import logging
import shutil
import uuid
from collections import Counter, deque
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from types import TracebackType
from typing import Any

from dirotq.errors import ArtifactError, UnsupportedError
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.divided import Inputs
from dirotq.pipeline.stage import recipe
from dirotq.pipeline.units import Units
from dirotq.pipeline.worker import Job, Seen, Worker, environment

log = logging.getLogger(__name__)

TRIES = 3
"""Processes that a unit may take down before it is given up."""
MOST = 8
"""Units given out at once: a worker reads one while it computes another, and hashes a third."""

MEETING = ".meeting"
"""Folder of what workers hand to each other while they make units that follow each other."""
LOOK = 1.0
"""Seconds between two looks for units that are finished meanwhile."""


class Crew:
    """``count`` workers, started when there is something to do and stopped with the block.

    devices  GPUs for them, in turn: each sees one; None: they compute where the stage says

    ``peaks``: {worker: the memory that it took}, since they were cleared.
    """

    def __init__(self, count: int, devices: Sequence[int] | None) -> None:
        chosen = (
            [None] * count if devices is None else [devices[i % len(devices)] for i in range(count)]
        )
        self._workers = [Worker(environment(count, device)) for device in chosen]
        self._devices = devices
        self.peaks: dict[int, dict[str, int]] = {}

    def __enter__(self) -> "Crew":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def share(
        self, stage: Any, units: Units, todo: Sequence[str], inputs: Inputs
    ) -> Generator[str, None, None]:
        """Have the units ``todo`` made; yield the names of those that are finished and intact.

        What a worker leaves behind when it dies is given out again, one unit at a time. An error
        that a unit raises is the stage's, as it would be here.

        Raises UnsupportedError naming a unit that took down TRIES workers.
        """
        job = self._job(stage, units, todo, inputs)
        left, lost = deque(todo), Counter[str]()
        idle = self._workers[: len(todo)]
        for worker in idle:  # all begin to start before one is waited for
            worker.start()
        running: dict[Future[Seen], tuple[Worker, list[str]]] = {}

        def give_out() -> None:
            while left and idle:
                worker, names = idle.pop(0), self._next(left, lost)
                running[worker.make(job, names)] = worker, names

        try:
            give_out()
            while running:
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    worker, names = running.pop(future)
                    if not (died := self._died(future, inputs)):
                        idle.append(worker)
                        give_out()  # it goes on while what it made is looked at
                    finished = units.adopt(names)
                    missing = [name for name in names if name not in finished]
                    if died:
                        self._again(stage, worker, missing, lost)
                        left.extend(missing)
                        idle.append(worker)
                        give_out()
                    elif missing:
                        raise ArtifactError(_spoilt(stage.what, missing[0]))
                    yield from finished
        except BaseException:  # before the folder's lock is let go
            for worker, _ in running.values():
                worker.stop()
            raise
        self._rest()

    def chain(
        self, stage: Any, units: Units, todo: Sequence[str], inputs: Inputs
    ) -> Generator[str, None, None]:
        """Have units made that follow each other, and of each every worker does its part.

        When one dies, all are ended, and begin anew with the units that are left.

        Raises UnsupportedError if that happens TRIES times to one unit.
        """
        left, lost, meeting = list(todo), Counter[str](), units.out / MEETING
        try:
            while left:
                died, place = None, meeting / uuid.uuid4().hex
                for worker in self._workers:
                    worker.start()
                running: dict[Future[Seen], Worker] = {}
                for index, worker in enumerate(self._workers):
                    part = stage.part(index, len(self._workers), place)
                    running[worker.make(self._job(part, units, left, inputs), left)] = worker
                while running and died is None:
                    ended, _ = wait(running, LOOK, FIRST_COMPLETED)
                    for future in ended:
                        worker = running.pop(future)
                        died = worker if self._died(future, inputs) else died
                    finished = units.adopt(left)
                    left = [name for name in left if name not in finished]
                    yield from finished
                if died is not None and left:
                    self._again(stage, died, left[:1], lost)
                    self.stop()
                elif left:
                    raise ArtifactError(_spoilt(stage.what, left[0]))
            if meeting.exists():
                shutil.rmtree(meeting)
        except BaseException:
            self.stop()
            raise
        self._rest()

    def stop(self) -> None:
        """End all workers, before the lock of a folder that they write to is let go."""
        for worker in self._workers:
            worker.stop()

    def _rest(self) -> None:
        """Have the workers let go of what they opened; add to the peaks of this stage."""
        for index, resting in enumerate([worker.rest() for worker in self._workers]):
            with contextlib.suppress(BrokenExecutor):  # it is started anew when it is needed
                took, before = resting.result(), self.peaks.setdefault(index, {})
                before |= {what: max(size, before.get(what, 0)) for what, size in took.items()}

    def _job(self, stage: Any, units: Units, todo: Sequence[str], inputs: Inputs) -> Job:
        known = recipe(stage)
        if self._devices is not None and hasattr(stage, "device"):
            stage = dataclasses.replace(stage, device="cuda")  # the one that the worker sees
        # Without what this process knows of them: a worker checks what it reads.
        fresh = {slot: Artifact(a.stage, a.fingerprint, a.path) for slot, a in inputs.items()}
        return Job(uuid.uuid4().hex, stage, known, units.out, tuple(todo), fresh)

    def _next(self, left: deque[str], lost: Counter[str]) -> list[str]:
        """Take what one worker is given next: less towards the end, and one that was lost alone."""
        count = max(1, min(MOST, len(left) // (2 * len(self._workers))))
        names = [left.popleft()]
        while len(names) < count and not lost[names[0]] and left and not lost[left[0]]:
            names.append(left.popleft())
        return names

    def _died(self, future: Future[Seen], inputs: Inputs) -> bool:
        """Tell whether the worker died; else note what it read, or raise the error it met."""
        try:
            seen = future.result()
        except BrokenExecutor:
            return True
        for slot, files in seen.items():
            inputs[slot].saw(files)
        return False

    def _again(self, stage: Any, worker: Worker, missing: list[str], lost: Counter[str]) -> None:
        """Note which units a worker died with, and have another in its place."""
        started = worker.started
        worker.stop()
        lost.update(missing)
        for name in missing:
            if lost[name] >= TRIES:
                raise UnsupportedError(_given_up(stage.what, name) if started else NO_START)
        what = missing[0] if len(missing) == 1 else f"what it had ({len(missing)} units)"
        log.warning("%s: a worker died; %s is tried again", stage.what, what)


NO_START = (
    "worker processes end while they start; what they said stands above. A Python script that runs "
    "with executor.workers or executor.devices is imported by each of them: let it do its work "
    'under `if __name__ == "__main__":`'
)


def _spoilt(what: str, name: str) -> str:
    return (
        f"{what}: {name} is not as it was written: another program changes the store while it is "
        "written to; the same command makes it anew"
    )


def _given_up(what: str, name: str) -> str:
    return (
        f"{what}: {name} ended {TRIES} workers one after the other; each was killed or crashed "
        "(out of memory, a fault of a driver or library): the kernel's log (`dmesg`) tells. Fewer "
        "workers leave more memory to each (executor.workers); finished work is kept; the same "
        "command resumes"
    )
