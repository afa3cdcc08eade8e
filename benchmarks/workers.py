"""What sharing units out to processes costs and gains: tiny-flux on a CPU, one thread each.

    python benchmarks/workers.py --workers 2 --stages gptq --store artifacts

Prints, per stage: seconds in this process, with one worker and with several, and what a unit costs
more in a worker. Workers run already. The best of several runs; ways take turns.
"""

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dirotq.pipeline import dag
from dirotq.pipeline.build import build
from dirotq.pipeline.config import compose_config
from dirotq.pipeline.crew import Crew
from dirotq.pipeline.divided import Inputs, Share, in_units
from dirotq.pipeline.executor import LocalExecutor
from dirotq.pipeline.worker import Processes

STAGES = ("capture", "basis", "gptq", "fuse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny_flux")
    parser.add_argument("--store", default="artifacts")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stages", nargs="+", default=STAGES)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="e.g. capture.calls=64")
    options = parser.parse_intermixed_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers'
    torch.set_num_threads(1)
    told = [f"model={options.model}", f"store={options.store}", "until=pack", "device=cpu"]
    line = build(compose_config([*told, *options.overrides], "dirotq.conf"))
    made = {n: o.artifact for n, o in dag.run(line.steps, line.store, LocalExecutor()).items()}
    count = options.workers
    print(
        f"{options.model}, {os.cpu_count()} cores of {platform.machine()}, torch "
        f"{torch.__version__}, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}\n\n"
        f"| stage | units | here, s | 1 worker, s | {count} workers, s | gain "
        "| ms more per unit |\n" + "|---" * 7 + "|"
    )  # fmt: skip
    with Crew(Processes(1)) as one, Crew(Processes(count)) as several:
        ways: dict[str, tuple[Share, ...]] = {
            "here": (), "one": (one.share, one.chain), "several": (several.share, several.chain)
        }  # fmt: skip
        for step in line.steps:
            if step.name not in options.stages:
                continue
            inputs = {slot: made[need] for slot, need in step.needs.items()}
            for way in ("one", "several"):  # processes start, torch is imported
                seconds(step.stage, inputs, *ways[way])
            took: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(options.repeat):
                for way, shares in ways.items():
                    took[way].append(seconds(step.stage, inputs, *shares))
            here, alone, shared = (min(took[way]) for way in ways)
            units = len(step.stage.units(**inputs))
            print(
                f"| {step.name} | {units} | {here:.2f} | {alone:.2f} | {shared:.2f} | "
                f"{alone / shared:.2f}x | {1000 * (alone - here) / units:.1f} |",
                flush=True,
            )
    print(f"\na worker starts in {start(line.steps[0].stage):.1f} s")


def seconds(stage: Any, inputs: Inputs, *shares: Share) -> float:
    """Time one run of a stage into a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        in_units(stage, Path(folder), inputs, *shares)
        return time.perf_counter() - began


def start(stage: Any) -> float:
    """Time how long a new worker takes until it has what a stage's code imports."""
    with Crew(Processes(1)) as crew:
        (worker,) = crew._workplace.workers
        began = time.perf_counter()
        worker.start()
        worker._submit(type, stage).result()  # to read the stage is to import it
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
