"""Four processes at a time on one store: runs, forced runs, gc, verify."""

import contextlib
import shutil
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from .world import Counts, Ended, World, forked

AT_A_TIME = 4
PATIENCE = 240
"""Seconds after which a round is taken for a deadlock."""


def races(world: World, count: int, random: Random) -> Counts:
    """No traceback, no wrong byte, no deadlock; afterwards the same command ends as ever."""
    counts = Counts("races of runs, force, gc and verify")
    for _ in range(count):
        place = world.folder("race")
        store = world.copy(place / "store", without=random.choice((*world.stages, None)))
        chosen = [random.choice(ACTS) for _ in range(AT_A_TIME)]
        problem = a_round(world, store, chosen, random)
        if problem is None:
            ended = world.compress(store)
            problem = None if ended.how == "done" else f"afterwards: {ended.how} {ended.said}"
        problem = problem or world.differences(store)
        counts.count(problem and f"{', '.join(a.__name__ for a in chosen)}: {problem}")
        shutil.rmtree(place, ignore_errors=True)
    return counts


def run(world: World, store: Path, random: Random) -> None:
    """The plain command."""
    from tiny_line import run as run_line

    run_line(world.line(store))


def force(world: World, store: Path, random: Random) -> None:
    """One stage is computed anew although it is there."""
    from dirotq.pipeline import dag

    line = world.line(store)
    stage = random.choice(world.stages)
    dag.run(line.steps, line.store, line.executor, force=[stage])


def gc(world: World, store: Path, random: Random) -> None:
    """Everything that no process holds on to goes."""
    _command("gc", "--keep", "0", "--yes", f"store={store}")


def verify(world: World, store: Path, random: Random) -> None:
    """Every artifact is read; one that goes away meanwhile is no damage."""
    _command("verify", f"store={store}")


ACTS: tuple[Callable[[World, Path, Random], None], ...] = (run, run, force, gc, verify)


def _command(*args: str) -> None:
    from dirotq.cli import main
    from dirotq.errors import ArtifactError

    status: object = 0
    try:
        main(args)
    except SystemExit as left:
        status = left.code
    if status:
        raise ArtifactError(f"{args[0]} ended with status {status}")


def a_round(
    world: World, store: Path, acts: list[Callable[[World, Path, Random], None]], random: Random
) -> str | None:
    """Let all acts happen at the same time; what went wrong."""
    context = get_context("fork")
    started = []
    for act in acts:
        mine, theirs = context.Pipe(duplex=False)
        seed = random.getrandbits(32)
        process = context.Process(target=_act, args=(theirs, act, world, store, seed))
        process.start()
        theirs.close()
        started.append((act, process, mine))
    ends, until = {}, time.monotonic() + PATIENCE
    for act, process, mine in started:
        if not mine.poll(max(until - time.monotonic(), 0)):
            for _, other, _ in started:
                other.kill()
            return f"{act.__name__} did not end within {PATIENCE} s"
        with contextlib.suppress(EOFError):
            ends[process.pid] = (act, mine.recv())
        process.join()
    for act, ended in ends.values():
        if ended.how != "done":
            return f"{act.__name__}: {ended.how} {ended.said}"
    return None


def _act(
    pipe: Connection,
    act: Callable[[World, Path, Random], None],
    world: World,
    store: Path,
    seed: int,
) -> None:
    ended: Ended = forked(lambda: act(world, store, Random(seed)))
    pipe.send(ended)
