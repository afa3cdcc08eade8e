"""Two heads with workers of their own on one store; in half of the rounds one of them is killed.

Workers are processes of this machine. In each fifth round those of the killed head are jobs of
submitit, if that is installed: they go on for a while, beside those of the head in its place.
"""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from .kills import left_behind
from .places import all_cached
from .races import a_round
from .workers import by_fork
from .world import Counts, World

LOCAL = ("executor.workers=2",)
JOBS = (
    "executor=slurm", "executor.cluster=local", "executor.workers=2", "executor.gpus=0",
    "executor.cpus=1", "executor.minutes=5",
)  # fmt: skip
UNTIL = "until=gptq"
SECONDS = 8.0
"""Within which a head is killed: about what it takes from the first stage to that one."""


def heads(world: World, count: int, random: Random) -> Counts:
    """One result, nothing lost, no deadlock: the head that lives ends, and all is there then."""
    counts = Counts("racing heads with workers")
    jobs = JOBS if importlib.util.find_spec("submitit") else LOCAL
    for number in range(count):
        place = world.folder("heads")
        store = world.copy(place / "store", without=random.choice(("capture", "basis", "gptq")))
        killed = random.uniform(0, SECONDS) if number % 2 else None
        how = jobs if number % 5 == 3 else LOCAL
        acts = [_head(how, killed), _head(LOCAL, None)]
        problem = a_round(world, store, acts, random) or world.differences(store, until="gptq")
        problem = problem or left_behind(store) or all_cached(world, store, UNTIL)
        counts.count(problem and f"{how[0]}, one killed after {killed} s: {problem}")
        shutil.rmtree(place, ignore_errors=True)
    return counts


def _head(how: tuple[str, ...], seconds: float | None) -> Callable[[World, Path, Random], None]:
    def head(world: World, store: Path, random: Random) -> None:
        ended = world.compress(store, *how, UNTIL, before=by_fork, seconds=seconds)
        if ended.how != "done" and not (ended.how == "killed" and seconds):
            raise RuntimeError(f"{ended.how} {ended.said}")

    return head
