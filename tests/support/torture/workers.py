"""Runs with two workers: SIGKILL of a random one, or of the head, in a random stage and moment.

Half of the moments are seconds, half are files: work is short between two of them.
"""

import contextlib
import multiprocessing
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import psutil

from dirotq.pipeline.disk import replacing

from .kills import left_behind
from .world import Counts, World

SHARED = ("capture", "basis", "gptq", "fuse")
"""Stages whose units workers make."""
WORKERS = 2
MOST = 2
"""Workers that are killed in one run: three of one unit would rightly end it."""
HEAD = "head"


@dataclass(frozen=True, slots=True)
class Moment:
    """``seconds`` after the last kill, or when so many ``files`` of the draft are there."""

    seconds: float | None
    files: int | None

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s" if self.seconds is not None else f"{self.files} files"


def workers(world: World, count: int, random: Random) -> Counts:
    """The run ends, or the next one if its head was killed, with the bytes of an undisturbed one.

    A moment counts from when both workers run.
    """
    counts, hit = Counts("killed workers and heads, same command"), Counter[str]()
    usual = {stage: _measured(world, stage) for stage in SHARED[:count]}
    for number in range(count):
        stage = SHARED[number % len(SHARED)]  # all of them alike
        seconds, files = usual[stage]
        store = world.copy(world.folder("workers") / "store", without=stage)
        victims = [random.randrange(WORKERS) for _ in range(random.randint(1, MOST))]
        plan = [(f"worker {victim}", _moment(seconds, files, random)) for victim in victims]
        if random.random() < 1 / 3:
            head = (HEAD, _moment(seconds, files, random))
            plan.insert(random.randint(0, len(plan)), head)
        problem, told = None, store.parent / "told"
        while problem is None and plan:
            run, plan = _until_head(plan)
            ended = world.compress(
                store, f"executor.workers={WORKERS}", f"until={stage}", before=by_fork,
                beside=partial(kill, run, store / stage, told),
            )  # fmt: skip
            if ended.how not in ("done", "killed") or (
                ended.how == "killed" and run[-1][0] != HEAD
            ):
                problem = f"{ended.how}: {ended.said}"
        if problem is None:
            last = f"executor.workers={WORKERS}", f"until={stage}"
            ended = world.compress(store, *last, before=by_fork)
            problem = None if ended.how == "done" else f"the last run: {ended.how}: {ended.said}"
        problem = problem or world.differences(store, until=stage) or left_behind(store)
        lines = told.read_text().splitlines() if told.exists() else []
        hit.update(f"{stage}: {line.partition(' at ')[0].split()[0]}" for line in lines)
        counts.count(problem and f"{stage}, {'; '.join(lines)}: {problem}")
        shutil.rmtree(store.parent)
    counts.notes.append(", ".join(f"{what} {times}x" for what, times in sorted(hit.items())))
    return counts


def kill(plan: list[tuple[str, Moment]], drafts: Path, told: Path, head: int) -> None:
    """Kill those of the run of ``head``, each at its moment, and write down who was there."""
    process = psutil.Process(head)
    for victim, moment in plan:
        began = time.monotonic()
        while _lives(process):
            late = moment.seconds is not None and time.monotonic() - began >= moment.seconds
            if len(found := workers_of(process)) == WORKERS and (late or _reached(drafts, moment)):
                break
            time.sleep(0.002)
        if not _lives(process):
            return
        hit = process if victim == HEAD else found[int(victim.split()[1])]
        with contextlib.suppress(psutil.NoSuchProcess), told.open("a") as file:
            hit.kill()
            file.write(f"{victim} at {moment}\n")
        while _lives(hit):
            time.sleep(0.002)


def workers_of(head: psutil.Process) -> list[psutil.Process]:
    """Processes that make units, in the order of their ids."""
    with contextlib.suppress(psutil.NoSuchProcess):
        found = [child for child in head.children() if _makes(child)]
        return sorted(found, key=lambda child: child.pid)
    return []


def _makes(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "resource_tracker" not in " ".join(process.cmdline()) and _lives(process)
    return False


def by_fork() -> None:
    """Have workers forked, not spawned: torch is there at once, and moments are of their work."""
    plain = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: plain("fork")


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def files_of(drafts: Path) -> int:
    """Files in what is being made."""
    return sum(1 for path in drafts.glob("*.partial/data/**/*") if path.is_file())


def _reached(drafts: Path, moment: Moment) -> bool:
    with contextlib.suppress(OSError):  # it is published, or a file is gone
        return moment.files is not None and files_of(drafts) >= moment.files
    return False


def _moment(seconds: float, files: int, random: Random) -> Moment:
    if random.random() < 0.5:
        return Moment(random.uniform(0, seconds), None)
    return Moment(None, random.randint(0, files))


def _until_head(
    plan: list[tuple[str, Moment]],
) -> tuple[list[tuple[str, Moment]], list[tuple[str, Moment]]]:
    """The part of the plan up to the head's end, and the rest, for the run after it."""
    at = next((i for i, (victim, _) in enumerate(plan) if victim == HEAD), len(plan) - 1)
    return plan[: at + 1], plan[at + 1 :]


def _measured(world: World, stage: str) -> tuple[float, int]:
    """Seconds that a stage takes once its workers run, and the most files that are there."""
    store = world.copy(world.folder("measure") / "store", without=stage)
    note = store.parent / "note"

    def watch(head: int) -> None:
        process, began, most = psutil.Process(head), 0.0, 0
        while _lives(process):
            if not began and len(workers_of(process)) == WORKERS:
                began = time.monotonic()
            with contextlib.suppress(OSError):
                most = max(most, files_of(store / stage))
            with replacing(note) as scratch:
                scratch.write_text(f"{time.monotonic() - began if began else 0:.3f} {most}")
            time.sleep(0.01)

    told = f"executor.workers={WORKERS}", f"until={stage}"
    world.compress(store, *told, before=by_fork, beside=watch)
    seconds, files = note.read_text().split()
    shutil.rmtree(store.parent, ignore_errors=True)
    return float(seconds), int(files)
