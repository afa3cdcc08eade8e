"""FLUX.1's units, as long as they were measured, slept through by actors of a Ray cluster here; and
what the simulation of `dirotq plan` says of them.

    python benchmarks/cluster_replay.py --workers 8 32 --slower 4

Sleeping takes no core, so that many workers fit on a few. --slower makes all units so many times
longer, and results are divided by it: the cores here also do the work of 32 machines' processes,
which start, unpickle and hash.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dirotq.pipeline.crew import Crew
from dirotq.pipeline.divided import Make, in_units
from dirotq.pipeline.forecast import makespan
from dirotq.pipeline.ray_cluster import Actors, RayExecutor
from dirotq.pipeline.units import Made, Units

FLUX: Mapping[str, Sequence[float]] = {
    # docs/compress.md: 331 s less 190 s of replay for 24 prompts, four at a time
    "capture": (141 / 6,) * 6,
    "basis": (30 / 304,) * 304,
    # 130 to 180 ms a site; the stage took 58 s
    "gptq": tuple(0.13 + 0.05 * (i % 6) / 5 for i in range(304)),
    "fuse": (10.0, 20.0),
}
"""Seconds of units on an H200; fuse's two and the spread of gptq's are assumed."""


@dataclass(frozen=True, kw_only=True)
class Sleeping:
    """Units that sleep, and write a line each."""

    version: ClassVar[str] = "1"
    what: ClassVar[str] = "units"
    seconds: tuple[float, ...]

    def run(self, out: Path) -> Mapping[str, float]:
        return in_units(self, out, {})

    def units(self) -> Sequence[str]:
        return [f"{i:04d}" for i in range(len(self.seconds))]

    def maker(self, out: Path, names: Sequence[str]) -> Make:
        def make(names: Iterable[str]) -> Iterator[Made]:
            for name in names:
                time.sleep(self.seconds[int(name)])
                (out / name).write_text(name)
                yield name, [out / name]

        return make

    def merge(self, units: Units) -> Mapping[str, float]:
        return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--slower", type=float, default=4.0)
    parser.add_argument("--stages", nargs="+", default=list(FLUX))
    options = parser.parse_args()
    import cluster_replay  # by the name that actors import it under

    print(
        f"{os.cpu_count()} cores of {platform.machine()}, load {os.getloadavg()[0]:.1f}, "
        f"{time.strftime('%Y-%m-%d')}, units {options.slower:g} times slower\n\n"
        "| stage | units | workers | simulated, s | on Ray, s | more | ms per unit |\n" + "|---" * 7
        + "|"
    )  # fmt: skip
    for workers in options.workers:
        executor = RayExecutor(workers=workers, cpus=1, gpus=0, address=None)
        with Crew(Actors(executor)) as crew:
            took(crew, cluster_replay.Sleeping(seconds=(0.5,) * workers * 2))  # they start
            for name in options.stages:
                units = tuple(s * options.slower for s in FLUX[name])
                simulated = makespan(units, workers, executor.helping)
                real = took(crew, cluster_replay.Sleeping(seconds=units))
                busy = min(workers, len(units))
                print(
                    f"| {name} | {len(units)} | {workers} | {simulated / options.slower:.2f} | "
                    f"{real / options.slower:.2f} | {100 * (real / simulated - 1):.1f} % | "
                    f"{1000 * (real - simulated) * busy / len(units):.0f} |",
                    flush=True,
                )


def took(crew: Crew, stage: Sleeping) -> float:
    """Time one run of a stage into a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        in_units(stage, Path(folder), {}, crew.share)
        return time.perf_counter() - began


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    here = str(Path(__file__).parent)
    sys.path.insert(0, here)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *sys.path])
    main()
