"""`make bench-kernels`: the packed linears and their kernels against 16 bits, FP8 and the memory.

usage: python benchmarks/speed.py [linear gemm transform_quantize unpack_w4 w4a16 norm_rope memory
           parts] [--write] [--csv FILE] [--from FILE] [--select EXPRESSION] [--revision TEXT]

Runs the GPU tests first; if one fails, it prints that and no figure. Every result is compared with
float64 before it is timed. Rows go to --csv; --write puts them into docs/kernels.md and .csv, and
--from does so with the rows of an earlier run, without a GPU.
"""

import argparse
import datetime
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from dirotq.benchmarks.published import append, machine, put, read
from dirotq.benchmarks.speed_table import TITLES, Row, tables

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/gpu/test_kernels_cuda.py"
WORKERS = 8
"""Processes that run the tests, where pytest-xdist is installed: compiling takes the time."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(TITLES)}; all if none")
    parser.add_argument("--write", action="store_true", help="update docs/kernels.md and .csv")
    parser.add_argument("--csv", type=Path, default=ROOT / "artifacts" / "bench" / "kernels.csv")
    parser.add_argument("--from", dest="source", type=Path, help="rows of an earlier run")
    parser.add_argument("--select", default="", help="which tests to run first (pytest -k)")
    parser.add_argument("--revision", help="what to record as the code's version", default=None)
    options = parser.parse_args(arguments)
    if unknown := set(options.ops) - set(TITLES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(TITLES)}")
    ops = options.ops or list(TITLES)
    if options.source:
        rows = [row for row in read(options.source, Row) if row.op in ops]
    else:
        if problem := why_not(options.select):
            print(problem, file=sys.stderr)
            return 1
        date = str(datetime.datetime.now(datetime.UTC).date())
        about = machine(options.revision)
        rows = [replace(row, **about, date=date) for row in measured(ops)]
        append(options.csv, rows)
    print(tables(rows))
    if options.write:
        publish(rows, ROOT / "docs")
    return 0


def why_not(select: str) -> str | None:
    """Say why no figure may be printed: no GPU, or tests that fail; None if all is well."""
    import torch

    if not torch.cuda.is_available():
        return "benchmarks/speed.py needs a CUDA GPU, and torch finds none"
    return red(TESTS, select)


def red(tests: str, select: str = "") -> str | None:
    """Return what pytest says of tests that fail, or of none found; None if all pass."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", tests]
    command += ["-k", select] if select else []
    command += ["-n", str(WORKERS)] if find_spec("xdist") else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        print(done.stdout.strip().splitlines()[-1], flush=True)
        return None
    return f"{done.stdout}\n{done.stderr}\n{tests} must pass before anything is timed"


def measured(ops: list[str]) -> Iterator[Row]:
    """Measure every row of the ops, each said as soon as it is known."""
    from dirotq.benchmarks.speed_rows import MEASURES

    for op in ops:
        for row in MEASURES[op]():
            print(f"{row.op:<20}{row.case:<40}{row.contestant:<32}{_short(row)}", flush=True)
            yield row


def publish(rows: list[Row], docs: Path) -> None:
    """Write docs/kernels.md, and the rows it shows into docs/kernels.csv."""
    put(docs / "kernels.md", "make bench-kernels", tables(rows))
    (docs / "kernels.csv").unlink(missing_ok=True)
    append(docs / "kernels.csv", rows)


def _short(row: Row) -> str:
    time = "" if row.us_p50 is None else f"{row.us_p50:9.1f} us"
    ratio = "" if row.ratio is None else f"{row.ratio:8.2f}x"
    return f"{time:<12}{ratio:<10}{row.verdict().strip('*'):<10}{row.plan}"


if __name__ == "__main__":
    sys.exit(main())
