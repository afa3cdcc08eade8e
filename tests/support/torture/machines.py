"""One machine of several fails: its clock, its disk, its network."""

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import cast

import psutil

from dirotq.pipeline.crew import Crew
from dirotq.pipeline.desk import Desk
from dirotq.pipeline.executor import LocalExecutor, RunStage, run_shared
from dirotq.pipeline.job import Job, Seen, answer
from dirotq.pipeline.worker import Process, Processes, environment
from dirotq.pipeline.workplace import LostError, settle, shared_desk

from .disk import TOLD
from .kills import left_behind
from .workers import SHARED, WORKERS, files_of
from .world import Counts, Ended, World, forked

INSIDE = Path(__file__).parent / "inside"
ENDS = 10.0
"""Seconds in which a worker whose run is over ends itself."""


def machines(world: World, count: int, random: Random) -> Counts:
    """Each of the situations below ``count`` times over, in a random stage each time."""
    counts = Counts("one machine's clock, disk or network")
    for number in range(count):
        situation, place = SITUATIONS[number % len(SITUATIONS)], world.folder("machine")
        stage = random.choice(SHARED)
        store = world.copy(place / "store", without=stage)
        problem = situation(world, store, stage, random)
        problem = problem or world.differences(store, until=stage) or left_behind(store)
        counts.count(problem and f"{situation.__name__}, {stage}: {problem}")
        shutil.rmtree(place, ignore_errors=True)
    return counts


def clock_of_a_worker(world: World, store: Path, stage: str, random: Random) -> str | None:
    """One worker is an hour ahead or behind, and the head another one."""
    hour, plain = random.choice((-3600.0, 3600.0)), time.time

    def before() -> None:
        time.time = lambda: plain() - hour

    return _done(_hurt(world, store, stage, {"clock": hour}, before))


def full_disk_of_a_worker(world: World, store: Path, stage: str, random: Random) -> str | None:
    """One worker can write nowhere but to the store."""
    return _full(world, store, stage, {"full": str(store)})


def full_store_for_a_worker(world: World, store: Path, stage: str, random: Random) -> str | None:
    """One worker has used up its quota of the store at a random file."""
    fault = {"within": str(store), "after": random.randint(0, 30)}
    return _full(world, store, stage, fault)


def a_node_that_comes_back(world: World, store: Path, stage: str, random: Random) -> str | None:
    """A node is lost while it writes, others do its work, and it goes on beside them."""
    files, away = random.randint(1, 30), random.uniform(0, 1.5)

    def job() -> str | None:
        from dirotq.pipeline import dag

        line = world.line(store, f"until={stage}")
        nodes = Nodes(store / stage, files, away)
        dag.run(line.steps, line.store, cast(LocalExecutor, nodes))
        end = time.monotonic() + ENDS
        while nodes.lost and psutil.pid_exists(nodes.lost) and time.monotonic() < end:
            if psutil.Process(nodes.lost).status() == psutil.STATUS_ZOMBIE:
                return None
            time.sleep(0.1)
        return "it never ended" if nodes.lost and psutil.pid_exists(nodes.lost) else None

    ended = forked(job)
    return _done(ended) or ended.said


SITUATIONS: tuple[Callable[[World, Path, str, Random], str | None], ...] = (
    clock_of_a_worker, full_disk_of_a_worker, full_store_for_a_worker, a_node_that_comes_back,
)  # fmt: skip


def _full(world: World, store: Path, stage: str, fault: dict[str, object]) -> str | None:
    """All is done as ever, or the message says that the disk is full; then, with room, it is."""
    ended = _hurt(world, store, stage, fault)
    if ended.how == "refused" and any(word in str(ended.said) for word in TOLD):
        ended = world.compress(store, f"executor.workers={WORKERS}", f"until={stage}")
    return _done(ended)


def _hurt(
    world: World,
    store: Path,
    stage: str,
    fault: dict[str, object],
    more: Callable[[], None] = lambda: None,
) -> Ended:
    """Run a stage with workers one of which has a fault (inside/sitecustomize.py)."""
    once = store.parent / "hurt"

    def before() -> None:
        os.environ["TORTURE"] = json.dumps(fault | {"once": str(once)})
        os.environ["PYTHONPATH"] = f"{INSIDE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        more()

    told = f"executor.workers={WORKERS}", f"until={stage}"
    ended = world.compress(store, *told, before=before)
    if ended.how == "done" and not once.exists():
        return Ended("unharmed", "no worker had the fault")
    return ended


def _done(ended: Ended) -> str | None:
    return None if ended.how == "done" else f"{ended.how}: {ended.said}"


@dataclass
class Nodes:
    """An executor whose first worker is lost when so many ``files`` of the ``drafts`` are there,
    and goes on when it was ``away`` so many seconds."""

    drafts: Path
    files: int
    away: float
    lost: int = 0

    processes = WORKERS

    def refuse(self, device: str, setting: str) -> None:
        """Anything may be computed anywhere."""

    @contextlib.contextmanager
    def opened(self) -> Iterator[RunStage]:
        """As a cluster's executor does."""
        place, over = Remote(WORKERS), threading.Event()
        losing = threading.Thread(target=self._lose, args=(place, over), daemon=True)
        losing.start()
        with Crew(place) as crew:
            yield partial(run_shared, crew, None)
        over.set()

    def _lose(self, place: "Remote", over: threading.Event) -> None:
        first = cast(Node, place.workers[0])
        while not over.wait(0.002):
            with contextlib.suppress(OSError):
                if first.working and files_of(self.drafts) >= self.files:
                    self.lost = first.lose()
                    break
        if self.lost:
            over.wait(self.away)
            os.kill(self.lost, signal.SIGCONT)


class Remote(Processes):
    """Processes that hear of their run at a desk only, as those of other machines."""

    together = False

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.workers: Sequence[Process] = [Node(environment(count, None)) for _ in range(count)]

    def desk(self, out: Path) -> contextlib.AbstractContextManager[Desk]:  # type: ignore[override]
        return shared_desk(out)


class Node(Process):
    """A process of which its run may lose sight."""

    _future: Future[Seen] | None = None
    _lost = False

    @property
    def working(self) -> bool:
        """Whether it runs, and has units."""
        return self.started and self._future is not None and not self._future.done()

    def lose(self) -> int:
        """Let it stand still, and its run believe that it is gone; its id."""
        assert self._pid is not None and self._future is not None
        pid, self._lost = self._pid.result(), True
        os.kill(pid, signal.SIGSTOP)
        self._future.set_exception(LostError("the node does not answer"))
        return pid

    def make(self, job: Job, names: Sequence[str]) -> Future[Seen]:
        self.start()
        self._future = future = Future[Seen]()

        def told(asked: Future[object]) -> None:
            if not future.done():
                settle(future, cast(Callable[..., object], asked.result))  # type: ignore[arg-type]

        self._submit(answer, job, list(names)).add_done_callback(told)
        return future

    def stop(self) -> None:
        if not self._lost:
            return super().stop()
        self._lost, self._pool, self._pid, self._relay = False, None, None, None
        return None
