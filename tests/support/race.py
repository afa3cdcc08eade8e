"""Many processes on one store: the toy line run, forced, verified and collected all at once."""

import contextlib
import io
import logging
import multiprocessing
import random
import time
import traceback
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from toyline.stages import Numbers, Squares, Total, ToyModel

from dirotq.errors import DirotqError
from dirotq.pipeline import dag, housekeeping, runs
from dirotq.pipeline.executor import LocalExecutor
from dirotq.pipeline.store import ArtifactStore

WIRING = {
    "numbers": {},
    "squares": {"numbers": "numbers"},
    "total": {"numbers": "numbers", "squares": "squares"},
}
STAGES = list(WIRING)


def race(
    root: Path, *, processes: int, rounds: int, seed: int = 0, limit: float = 600
) -> list[str]:
    """Let ``processes`` do ``rounds`` of random things each to the store ``root``.

    returns  what went wrong: tracebacks, wrong totals, damage, a process that did not end within
             ``limit`` seconds; empty if all is well
    """
    spawn = multiprocessing.get_context("fork")
    told = spawn.Queue()
    workers = [
        spawn.Process(target=_work, args=(root, rounds, seed + i, told)) for i in range(processes)
    ]
    root.mkdir(exist_ok=True)  # without a store there is nothing to verify
    for worker in workers:
        worker.start()
    problems, deadline = [], time.monotonic() + limit
    for _ in workers:
        with contextlib.suppress(Exception):
            problems += told.get(timeout=max(deadline - time.monotonic(), 0.1))
    for number, worker in enumerate(workers):
        worker.join(max(deadline - time.monotonic(), 1))
        if worker.is_alive():
            problems.append(f"process {number} hangs")
            worker.kill()
    store = ArtifactStore(root)
    run(store)
    for artifact in store.everything():
        store.verify(artifact)
    problems += [f"left: {path}" for path in store.leftovers()]
    return problems


def _work(root: Path, rounds: int, seed: int, told: "multiprocessing.Queue[list[str]]") -> None:
    logging.getLogger().handlers.clear()
    choose, problems = random.Random(seed), []
    for number in range(rounds):
        power = choose.choice((2, 3))
        force = choose.choice(((), (), (choose.choice(STAGES),), STAGES))
        what = choose.choice(("run", "run", "gc", "verify", "plan"))
        try:
            _one(ArtifactStore(root), what, power, force)
        except Exception:  # noqa: BLE001
            problems.append(f"{seed}.{number} {what}: {traceback.format_exc()}")
    told.put(problems)


def _one(store: ArtifactStore, what: str, power: int, force: Sequence[str]) -> None:
    if what == "run":
        total = run(store, power, force)
        assert total == {2: 14, 3: 36}[power], f"the total of powers {power} is {total}"
        return
    with contextlib.redirect_stdout(io.StringIO()) as out:
        if what == "gc":
            status = housekeeping.gc(Namespace(store=store.root, keep=0, cache=None, yes=True))
        elif what == "verify":
            status = housekeeping.verify(Namespace(store=store.root, artifacts=[], remove=True))
        else:
            status = 0
            for artifact in store.list():
                with contextlib.suppress(DirotqError):  # removed between two lines
                    assert artifact.bytes > 0
    assert status == 0, out.getvalue()


def run(store: ArtifactStore, power: int = 2, force: Sequence[str] = ()) -> float:
    """The toy line, as its command runs it, without Hydra; its total."""
    pause = random.choice((0, 0.002))  # within each number
    stages = {
        "numbers": Numbers(
            model=ToyModel(path="", offset=0), count=4, trouble=None, ledger=None, pause=pause
        ),
        "squares": Squares(power=power, fail=False),
        "total": Total(),
    }
    steps = dag.plan(stages, WIRING)
    runs.record(runs.new_folder(store), store, {step.name: str(step) for step in steps})
    done = dag.run(steps, store, LocalExecutor(), force=force)
    return done["total"].artifact.metrics["total"]
