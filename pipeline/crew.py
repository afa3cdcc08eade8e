"""Processes of this machine that share out the units of a stage.

Each is a ``ProcessPoolExecutor`` of one, so that a process that dies is known together with the
units it had. It writes a unit's files and its entry in the journal itself; what it finished counts,
however it ends, and whatever it was told.
"""

import contextlib
import dataclasses
import logging
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


class Crew:
    """``count`` workers, started when there is something to do and stopped with the block.

    devices  GPUs for them, in turn: each sees one; None: they compute where the stage says

    ``peaks``: the memory that each took for the last stage.
    """

    def __init__(self, count: int, devices: Sequence[int] | None) -> None:
        chosen = (
            [None] * count if devices is None else [devices[i % len(devices)] for i in range(count)]
        )
        self._workers = [Worker(environment(count, device)) for device in chosen]
        self._devices = devices
        self.peaks: list[dict[str, int]] = []

    def __enter__(self) -> "Crew":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            worker.stop()

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
                        raise ArtifactError(
                            f"{stage.what}: {missing[0]} is not as it was written: another "
                            "program changes the store while it is written to; the same command "
                            "makes it anew"
                        )
                    yield from finished
        except BaseException:  # before the folder's lock is let go
            for worker, _ in running.values():
                worker.stop()
            raise
        self.peaks = []
        for resting in [worker.rest() for worker in self._workers]:
            with contextlib.suppress(BrokenExecutor):  # it is started anew when it is needed
                self.peaks.append(resting.result())

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


def _given_up(what: str, name: str) -> str:
    return (
        f"{what}: {name} ended {TRIES} workers one after the other; each was killed or crashed "
        "(out of memory, a fault of a driver or library): the kernel's log (`dmesg`) tells. Fewer "
        "workers leave more memory to each (executor.workers); finished work is kept; the same "
        "command resumes"
    )
