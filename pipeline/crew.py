"""Workers that share out the units of a stage, wherever they run (pipeline/workplace.py).

A worker writes a unit's files and its entry in the journal itself; what it finished counts, however
it ends, and whatever it was told.
"""

import contextlib
import dataclasses
import logging
import shutil
import time
import uuid
from collections import Counter, deque
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from typing import Any

from dirotq.errors import ArtifactError, UnsupportedError
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.desk import LEAVE, Desk
from dirotq.pipeline.divided import Inputs, NotShared
from dirotq.pipeline.job import Job, Seen
from dirotq.pipeline.stage import recipe
from dirotq.pipeline.units import Units
from dirotq.pipeline.workplace import LostError, Worker, Workplace

log = logging.getLogger(__name__)

TRIES = 3
"""Processes that a unit may take down before it is given up."""

MEETING = ".meeting"
"""Folder of what workers hand to each other while they make units that follow each other."""
LOOK = 1.0
"""Seconds between two looks for units that are finished meanwhile."""


class Crew:
    """Workers, started when there is something to do and stopped with the block.

    ``peaks``: {worker: the memory that it took}, since they were cleared.
    """

    def __init__(self, workplace: Workplace) -> None:
        self._workplace = workplace
        self.peaks: dict[int, dict[str, int]] = {}

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *error: object) -> None:
        self._workplace.close()

    def share(
        self, stage: Any, units: Units, todo: Sequence[str], inputs: Inputs
    ) -> Generator[str, None, None]:
        """Have the units ``todo`` made; yield the names of those that are finished and intact.

        What a worker leaves behind when it dies is given out again, one unit at a time. An error
        that a unit raises is the stage's, as it would be here.

        Raises UnsupportedError naming a unit that took down TRIES workers.
        """
        lost = Counter[str]()
        with self._workplace.desk(units.out) as desk:
            job = self._job(stage, units, todo, inputs, desk)
            yield from self._shared(stage, units, job, inputs, lost)
        if lost and desk:
            time.sleep(
                LEAVE
            )  # one may live, cut off from its cluster: that the desk is gone ends it

    def _shared(
        self, stage: Any, units: Units, job: Job, inputs: Inputs, lost: Counter[str]
    ) -> Generator[str, None, None]:
        left = deque(job.names)
        idle = [*self._workplace.workers[: len(left)]]
        for worker in idle:  # all begin to start before one is waited for
            worker.start()
        running: dict[Future[Seen], tuple[Worker, list[str]]] = {}

        def give_out() -> None:
            shares = []
            while left and idle:
                names = self._next(left, lost, len(idle))
                shares.append((idle.pop(0), names))
            running.update(zip(self._workplace.send(job, shares), shares, strict=True))

        try:
            give_out()
            while running:
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    worker, names = running.pop(future)
                    died = self._died(future, inputs)
                    if died is None:
                        idle.append(worker)
                        give_out()  # it goes on while what it made is looked at
                    finished = self._adopted(units, names, died)
                    missing = [name for name in names if name not in finished]
                    if died is not None:
                        self._again(stage, worker, missing, lost, died)
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

        Raises UnsupportedError if that happens TRIES times to one unit, NotShared where workers
        need not run at the same time.
        """
        left, lost, meeting = list(todo), Counter[str](), units.out / MEETING
        workers = self._workplace.workers
        if not self._workplace.together:
            raise NotShared("workers of a cluster need not run at the same time")
        try:
            while left:
                died, place = None, meeting / uuid.uuid4().hex
                for worker in workers:
                    worker.start()
                running: dict[Future[Seen], Worker] = {}
                for index, worker in enumerate(workers):
                    part = stage.part(index, len(workers), place)
                    job = self._job(part, units, left, inputs, None)
                    (future,) = self._workplace.send(job, [(worker, left)])
                    running[future] = worker
                while running and died is None:
                    ended, _ = wait(running, LOOK, FIRST_COMPLETED)
                    for future in ended:
                        worker = running.pop(future)
                        if (error := self._died(future, inputs)) is not None:
                            died = worker, error
                    finished = units.adopt(left)
                    left = [name for name in left if name not in finished]
                    yield from finished
                if died is not None and left:
                    self._again(stage, died[0], left[:1], lost, died[1])
                    self._stop()
                elif left:
                    raise ArtifactError(_spoilt(stage.what, left[0]))
            if meeting.exists():
                shutil.rmtree(meeting)
        except BaseException:
            self._stop()
            raise
        self._rest()

    def _stop(self) -> None:
        """End all workers, before the lock of a folder that they write to is let go."""
        for worker in self._workplace.workers:
            worker.stop()

    def _rest(self) -> None:
        """Have the workers let go of what they opened; add to the peaks of this stage."""
        for index, resting in enumerate([worker.rest() for worker in self._workplace.workers]):
            with contextlib.suppress(BrokenExecutor):  # it is started anew when it is needed
                took, before = resting.result(), self.peaks.setdefault(index, {})
                before |= {what: max(size, before.get(what, 0)) for what, size in took.items()}

    def _job(
        self, stage: Any, units: Units, todo: Sequence[str], inputs: Inputs, desk: Desk | None
    ) -> Job:
        known = recipe(stage)
        if isinstance(asked := getattr(stage, "device", None), str):
            stage = dataclasses.replace(stage, device=self._workplace.device(asked))
        # Without what this process knows of them: a worker checks what it reads.
        fresh = {slot: Artifact(a.stage, a.fingerprint, a.path) for slot, a in inputs.items()}
        return Job(uuid.uuid4().hex, stage, known, units.out, tuple(todo), fresh, desk)

    def _next(self, left: deque[str], lost: Counter[str], idle: int) -> list[str]:
        """Take what one worker is given next; one that was lost alone."""
        count = self._workplace.helping(len(left), idle)
        names = [left.popleft()]
        while len(names) < count and not lost[names[0]] and left and not lost[left[0]]:
            names.append(left.popleft())
        return names

    def _died(self, future: Future[Seen], inputs: Inputs) -> BrokenExecutor | None:
        """Return what the worker died of; else note what it read, or raise the error it met."""
        try:
            seen = future.result()
        except BrokenExecutor as error:
            return error
        for slot, files in seen.items():
            inputs[slot].saw(files)
        return None

    def _adopted(
        self, units: Units, names: Sequence[str], died: BrokenExecutor | None
    ) -> list[str]:
        """Take over finished units. Files that another machine wrote may take a while to show."""
        end = time.monotonic() + (0 if died else self._workplace.patience)
        while len(finished := units.adopt(names)) < len(names) and time.monotonic() < end:
            time.sleep(1)
        return finished

    def _again(
        self,
        stage: Any,
        worker: Worker,
        missing: list[str],
        lost: Counter[str],
        died: BrokenExecutor,
    ) -> None:
        """Note which units a worker died with, and have another in its place."""
        started = worker.started
        worker.stop()
        lost.update(missing)
        why = f" ({died})" if isinstance(died, LostError) else ""
        for name in missing:
            if lost[name] >= TRIES:
                said = _given_up(stage.what, name) if started else self._workplace.no_start
                raise UnsupportedError(f"{said}{why}")
        what = missing[0] if len(missing) == 1 else f"what it had ({len(missing)} units)"
        log.warning("%s: a worker died%s; %s is tried again", stage.what, why, what)


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
