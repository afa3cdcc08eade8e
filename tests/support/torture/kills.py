"""SIGKILL at a random moment of a random stage, up to three times in a row; then the same command.

Half of the moments are seconds, half are file operations: work is short between two of them.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

from .world import STAGES, Counts, World

TOUCHING = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")
"""Python's audit events of operations on files (sys.addaudithook)."""


def kills(world: World, count: int, random: Random) -> Counts:
    """The rerun ends, with the bytes of an undisturbed run; nothing else was ever published."""
    counts = Counts("random kills, rerun")
    usual = {stage: _measured(world, stage) for stage in world.stages[:count]}
    for number in range(count):
        stage = world.stages[number % len(world.stages)]  # all of them alike
        seconds, operations = usual[stage]
        store = world.copy(world.folder("kill") / "store", without=stage)
        problem, told = None, []
        for _ in range(random.randint(1, 3)):
            if random.random() < 0.5:
                at = random.randint(1, operations)
                told.append(f"file operation {at} of {operations}")
                ended = world.compress(store, f"until={stage}", before=partial(_die_at, at, store))
            else:
                after = random.uniform(0.2, 1.1) * seconds
                told.append(f"{after:.2f} of {seconds:.2f} s")
                ended = world.compress(store, f"until={stage}", seconds=after)
            if ended.how not in ("killed", "done"):
                problem = f"{ended.how}: {ended.said}"
            if problem := problem or world.differences(store, until=_before(stage)):
                break
        if problem is None:
            ended = world.compress(store, f"until={stage}")
            problem = None if ended.how == "done" else f"the rerun: {ended.how}: {ended.said}"
        problem = problem or world.differences(store, until=stage) or left_behind(store)
        counts.count(problem and f"{stage}, killed at {', '.join(told)}: {problem}")
        shutil.rmtree(store.parent)
    return counts


def count_operations(store: Path, each: Callable[[str, str], None]) -> None:
    """Call ``each(event, path)`` for every operation on files below ``store`` from now on."""
    root = str(store)

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in TOUCHING and args:
            path = os.fspath(args[0]) if isinstance(args[0], str | os.PathLike) else ""
            if isinstance(path, str) and (path.startswith(root) or not path.startswith("/")):
                each(event, path)

    sys.addaudithook(hook)


def _die_at(at: int, store: Path) -> None:
    left = at

    def each(event: str, path: str) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    count_operations(store, each)


def _measured(world: World, stage: str) -> tuple[float, int]:
    """Seconds and file operations that a stage takes."""
    store = world.copy(world.folder("measure") / "store", without=stage)
    record = store.parent / "operations"

    def count() -> None:
        handle = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        count_operations(store, lambda event, path: os.write(handle, b".") and None)

    began = time.monotonic()
    world.compress(store, f"until={stage}", before=count)
    seconds = time.monotonic() - began
    operations = record.stat().st_size
    shutil.rmtree(store.parent)
    return seconds, operations


def _before(stage: str) -> str:
    """The stage in front of ``stage``; itself if it is the first (which is then not asked for)."""
    place = STAGES.index(stage)
    return STAGES[place - 1] if place else ""


def left_behind(store: Path) -> str | None:
    """What a finished run must not leave behind."""
    left = [p for p in store.glob("*/*") if p.suffix == ".partial" or ".trash-" in p.name]
    return f"{left[0].name} was left behind" if left else None
