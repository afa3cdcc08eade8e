"""``python -m torture --kills 200 --power 200 ...``: hurt the line, print what became of it.

Ends with status 1 if anything went wrong. The same ``--seed`` does the same things again.
"""

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

# Before torch and triton are imported. The children are forks, so one thread; no GPU is used.
os.environ.update(OMP_NUM_THREADS="1", TRITON_INTERPRET="1", HF_HUB_OFFLINE="1")
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # what this process finds, workers find too

from composed_once import composed_once

from .damage import damage
from .disk import full_disk
from .heads import heads
from .kills import kills
from .machines import machines
from .places import places
from .power import power_loss
from .races import races
from .workers import workers
from .world import STAGES, Counts, World

KINDS: dict[str, Callable[[World, int, Random], Counts]] = {
    "kills": kills,
    "power": power_loss,
    "damage": damage,
    "disk": full_disk,
    "races": races,
    "places": places,
    "workers": workers,
    "heads": heads,
    "machines": machines,
}
USUAL = {
    "kills": 200, "power": 200, "damage": 500, "disk": 40, "races": 100, "places": 90,
    "workers": 50, "heads": 30, "machines": 20,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="torture", description=__doc__.splitlines()[0])
    for kind, count in USUAL.items():
        parser.add_argument(f"--{kind}", type=int, default=None, help=f"attempts ({count})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage hurt")
    options = parser.parse_args()
    asked = {kind: getattr(options, kind) for kind in KINDS}
    if all(count is None for count in asked.values()):
        asked = dict(USUAL)
    with tempfile.TemporaryDirectory(prefix="torture-") as root:
        failed = torture(Path(root), asked, options.seed, options.until)
    sys.exit(1 if failed else 0)


def torture(root: Path, asked: dict[str, int | None], seed: int, until: str) -> int:
    """Run every kind that was asked for; the number of attempts that went wrong."""
    import tiny_line  # noqa: F401 - imported once, for all forks
    from tqdm import tqdm

    import dirotq.loading
    import dirotq.stages.validate  # noqa: F401

    # Its lock is one for all processes: who is killed with it would stop all others for ever.
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())
    composed_once(setattr)
    gc.freeze()  # a fork that looks for garbage among all that was imported copies it
    world, failed = World.build(root, until), 0
    for kind, count in asked.items():
        if not count:
            continue
        began = time.monotonic()
        counts = KINDS[kind](world, count, Random(f"{kind} {seed}"))
        seconds = time.monotonic() - began
        print(f"{counts.kind}: {counts.survived} of {counts.tried} ({seconds:.0f} s)", flush=True)
        for note in counts.notes:
            print(f"  {note}", flush=True)
        failed += counts.tried - counts.survived
    return failed


if __name__ == "__main__":
    main()
