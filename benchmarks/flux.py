"""`make bench-flux`: FLUX.1 packed by our pipeline: its forward, kernels, images, and the floor.

usage: python benchmarks/flux.py [job ...] [--prepare] [--synthetic] [--minutes 9.5] [--write]
           [--models DIR] [--store DIR] [--csv FILE] [--from FILE] [--revision TEXT]
           [overrides ...]

One image of 1024 x 1024; other sizes, models and ways to run them: benchmarks/models.py. Weights
are generated and packed by our own pipeline on the first run (--prepare does only that);
later runs find them in --models and --store. Every row goes to --csv as soon as it is known;
--write puts all rows of that file into docs/speed.md and docs/speed.csv, and --from does so with
the file of a run elsewhere, without a GPU. --synthetic packs random codes in seconds instead; its
rows don't count and are never written to docs. Overrides (a.b=c) go to the pipeline.
"""

import argparse
import logging
import os
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dirotq.benchmarks.flux_table import tables
from dirotq.benchmarks.forward_rows import SYNTHETIC, Row, latest
from dirotq.benchmarks.published import append, machine, put, read

ROOT = Path(__file__).resolve().parents[1]
CSV = ROOT / "artifacts" / "bench" / "flux.csv"


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    if options.source is None:
        if problem := why_not():
            print(problem, file=sys.stderr)
            return 1
        measure(options)
    if options.prepare:
        return 0
    rows = latest(read(options.source or options.csv, Row))
    print(tables(rows))
    if options.write:
        publish(rows, ROOT / "docs")
    return 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    from dirotq.benchmarks.flux_jobs import JOBS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jobs", nargs="*", metavar="job", help=f"of {', '.join(JOBS)}; all if none")
    parser.add_argument("--prepare", action="store_true", help="make and pack the models, no more")
    parser.add_argument("--synthetic", action="store_true", help="random codes; does not count")
    parser.add_argument("--minutes", type=float, default=9.5, help="begin no job that takes longer")
    parser.add_argument("--models", type=Path, default=ROOT / "artifacts" / "full-size")
    parser.add_argument("--store", default=str(ROOT / "artifacts"))
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--from", dest="source", type=Path, help="rows of an earlier run")
    parser.add_argument("--write", action="store_true", help="update docs/speed.md and .csv")
    parser.add_argument("--revision", help="what to record as the code's version")
    options = parser.parse_intermixed_args(arguments)
    options.overrides = tuple(word for word in options.jobs if "=" in word)
    options.jobs = [word for word in options.jobs if "=" not in word]
    if unknown := set(options.jobs) - set(JOBS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(JOBS)}")
    options.jobs = [name for name in JOBS if name in options.jobs or not options.jobs]
    return options


def why_not() -> str | None:
    """Say why nothing can be measured here; None if it can."""
    import torch

    found = torch.cuda.is_available()
    return None if found else "benchmarks/flux.py needs a CUDA GPU, and torch finds none"


def measure(options: argparse.Namespace) -> None:
    """Run the jobs that the time allows; rows to the CSV file and the screen one by one."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as `dirotq` does
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    from dirotq.benchmarks.flux_jobs import JOBS
    from dirotq.benchmarks.session import Places, Session, healthy

    about = machine(options.revision) | {"run": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"}

    def say(row: Row) -> None:
        real = row.section in ("floor", "rate", "quality") or not options.synthetic
        row = replace(row, **about, weights=row.weights if real else SYNTHETIC)
        print(row, flush=True)
        append(options.csv, [row])

    names = ("models", "store", "synthetic", "overrides")
    places = Places(**{name: getattr(options, name) for name in names})
    if options.prepare:
        prepare(options.jobs, places)
        return
    session = Session(places, say)
    deadline = time.monotonic() + 60 * options.minutes
    for index, name in enumerate(options.jobs):
        job, left = JOBS[name], deadline - time.monotonic()
        if left < job.seconds:
            note = f"not run: {left:.0f} s left, up to {job.seconds:.0f} s needed"
            for case in job.cases:
                for who in job.contestants:
                    say(Row(section=job.section, case=case, contestant=who, note=note))
            continue
        print(f"--- {name}, {left:.0f} s left", flush=True)
        job.run(session)
        if not healthy():
            left = " ".join(options.jobs[index + 1 :]) or "none"
            raise SystemExit(f"{name} lost the GPU to this process; jobs left to run: {left}")


def prepare(jobs: list[str], places: Any) -> None:
    """Generate and pack what the jobs will load; a killed run goes on where it was."""
    for name in jobs:
        if name == "w4a8":
            places.packed("flux", "dirotq_w4a8")
        elif name == "quality":
            import dirotq

            dirotq.compress("tiny_flux", store=places.store, until="pack")
        else:
            places.packed("flux", "dirotq")


def publish(rows: list[Row], docs: Path) -> None:
    """Write docs/speed.md, and its rows into docs/speed.csv; synthetic ones into neither."""
    shown = [row for row in rows if row.weights != SYNTHETIC]
    put(docs / "speed.md", "make bench-flux", tables(shown))
    (docs / "speed.csv").unlink(missing_ok=True)
    append(docs / "speed.csv", shown)


if __name__ == "__main__":
    sys.exit(main())
