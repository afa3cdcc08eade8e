"""`make bench-models`: one forward of every family at full size, and whole images, on one GPU.

usage: python benchmarks/models.py [case ...] [--contestants packed,bf16,...] [--warm]
           [--profile] [--minutes 9.5] [--write] [--csv FILE] [--from FILE ...] [--revision TEXT]

Weights are random, packed ones too (benchmarks/contestants.py): times and bytes are those of real
ones, images mean nothing. Every row goes to --csv as soon as it is known; several commands add to
one file. --write puts all rows of that file into docs/speed.md and docs/models.csv, and --from does
so with the files of runs elsewhere, without a GPU.

First calls are cold: nothing compiled lies on disk when the command begins. --warm times them once
more in a second process that finds the first one's compiled code.
"""

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dirotq.benchmarks.flux import why_not
from dirotq.benchmarks.forward_rows import Row, latest
from dirotq.benchmarks.published import append, machine, put, read

ROOT = Path(__file__).resolve().parents[1]
CSV = ROOT / "artifacts" / "bench" / "models.csv"
RANDOM = "random codes"
LEAST = 40.0
"""Seconds: with less left, nothing more is begun."""


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    if options.source is None:
        if problem := why_not():
            print(problem, file=sys.stderr)
            return 1
        measure(options)
        if options.again:
            return 0
    from dirotq.benchmarks.models_table import tables

    rows = latest(row for file in options.source or [options.csv] for row in read(file, Row))
    print(tables(rows))
    if options.write:
        publish(rows, ROOT / "docs")
    return 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    from dirotq.benchmarks.model_jobs import CASES, CONTESTANTS, FEWER, IMAGES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = (*CASES, *FEWER, *IMAGES)
    usual = (*CASES, *IMAGES)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(known)}")
    parser.add_argument("--contestants", help=f"some of {','.join(CONTESTANTS)}; all if not given")
    parser.add_argument("--profile", action="store_true", help="where packed ones' time goes")
    parser.add_argument("--warm", action="store_true", help="first calls in a second process too")
    parser.add_argument("--minutes", type=float, default=9.5, help="begin nothing after that")
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--from", dest="source", type=Path, nargs="+", help="earlier rows")
    parser.add_argument("--write", action="store_true", help="update docs/speed.md and models.csv")
    parser.add_argument("--revision", help="what to record as the code's version")
    parser.add_argument("--again", metavar="RUN", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    words = options.contestants.split(",") if options.contestants else list(CONTESTANTS)
    for given, allowed in ((options.cases, known), (words, tuple(CONTESTANTS))):
        if unknown := [word for word in given if word not in allowed]:
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(allowed)}")
    options.cases = options.cases or list(usual)
    options.contestants = words
    return options


def measure(options: argparse.Namespace) -> None:
    """Run what the time allows; rows to the CSV file and the screen one by one."""
    deadline = time.monotonic() + 60 * options.minutes
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as `dirotq` does
    if not options.again:
        empty_caches()
    from dirotq.benchmarks.model_jobs import COMPILING, CONTESTANTS, IMAGES, PROFILED, order
    from dirotq.benchmarks.session import Places, Session

    run = options.again or f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
    about = machine(options.revision) | {"run": run}

    def say(row: Row) -> None:
        row = replace(row, **about, weights=RANDOM if row.weights else "")
        print(row, flush=True)
        append(options.csv, [row])

    session = Session(Places(models=ROOT, store="", synthetic=True), say)
    forwards = [name for name in options.cases if name not in IMAGES]
    chosen = [CONTESTANTS[word] for word in options.contestants]
    if options.again:
        chosen = [who for who in chosen if who in COMPILING]
    for who, case in order(forwards, chosen):
        section = "warm" if options.again else "forward"
        if not begun(session, deadline, section, str(case), who):
            continue
        (session.again if options.again else session.forward)(who, case)
        if options.profile and not options.again and who in PROFILED:
            session.profile(who, case)
    if options.again:
        return
    for name in (name for name in options.cases if name in IMAGES):
        images(session, name, chosen, deadline)
    session.drop()
    if options.warm and forwards:
        again(options, forwards, run, deadline)


def begun(session: Any, deadline: float, section: str, case: str, who: str) -> bool:
    """Return whether time is left; a row says if not. Ends the run where the GPU is lost."""
    from dirotq.benchmarks.session import healthy

    if not healthy():
        raise SystemExit(f"the GPU was lost to this process before {who}, {case}: run the rest")
    left = deadline - time.monotonic()
    if left >= LEAST:
        return True
    note = f"not run: {left:.0f} s left, {LEAST:.0f} needed"
    session.add(Row(section=section, case=case, contestant=who, note=note))
    return False


def images(session: Any, name: str, chosen: list[str], deadline: float) -> None:
    """Time whole images of the contestants that differ in them."""
    from dirotq.benchmarks.model_jobs import CASES, IMAGE_CONTESTANTS, order
    from dirotq.benchmarks.whole_images import whole

    model = name.removesuffix("_images")
    session.drop()
    make = functools.cache(lambda: whole(model, session.device))
    for who, case in order([model], [who for who in IMAGE_CONTESTANTS if who in chosen]):
        if begun(session, deadline, "image", str(CASES[model]), who):
            session.image(who, case, make)


def empty_caches() -> None:
    """Let torch and Triton compile into a folder that is new, so that first calls are cold."""
    folder = tempfile.mkdtemp(prefix="bench-models-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
    os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"


def again(options: argparse.Namespace, cases: list[str], run: str, deadline: float) -> None:
    """Time first calls in a new process, which finds what this one has compiled."""
    minutes = (deadline - time.monotonic()) / 60
    command = [
        sys.executable, __file__, *cases, "--again", run, "--csv", str(options.csv),
        f"--minutes={minutes:.2f}",
        "--contestants", ",".join(options.contestants),
        *(["--revision", options.revision] if options.revision else []),
    ]  # fmt: skip
    status = subprocess.run(command, check=False).returncode
    if status:
        print(f"the second process ended with status {status}", file=sys.stderr)


def publish(rows: list[Row], docs: Path) -> None:
    """Write docs/speed.md's block, and its rows into docs/models.csv."""
    from dirotq.benchmarks.models_table import tables

    put(docs / "speed.md", "make bench-models", tables(rows))
    (docs / "models.csv").unlink(missing_ok=True)
    append(docs / "models.csv", rows)


if __name__ == "__main__":
    sys.exit(main())
