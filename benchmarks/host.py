"""`make bench-host`: what one packed linear costs the host, outside of graphs and compilers.

usage: python benchmarks/host.py [--write] [--csv FILE] [--from FILE] [--revision TEXT]

Few calls are put on the empty GPU's queue at a time, so that the host never waits for it. Rows go
to --csv; --write puts them into docs/kernels.md, and --from does so with the rows of an earlier
run, without a GPU.
"""

import argparse
import datetime
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dirotq.benchmarks.published import append, machine, put, read
from dirotq.kernels import ops, recording
from dirotq.kernels.case import Case
from dirotq.kernels.linear import QuantLinear
from dirotq.kernels.recorder import Recorder
from dirotq.tuning.random_linear import random_linear, random_rows, spec_for

ROOT = Path(__file__).resolve().parents[1]
BATCH, BATCHES = 8, 100
"""Calls between two waits for the GPU, and how often."""

CASES = (
    ("w4a4", Case(name="PixArt out", m=4096, k=1152, n=1152, reach=60, stretch=30)),
    ("w4a4", Case(name="FLUX qkv", m=4608, k=3072, n=9216, reach=60, stretch=30)),
    ("w4a4", Case(name="FLUX out, few rows", m=64, k=3072, n=3072, reach=60, stretch=30)),
    ("w4a16", Case(name="FLUX modulation", m=1, k=3072, n=9216, reach=60, stretch=30)),
)
"""``reach`` and ``stretch`` are microseconds, at most."""

WHOLE = "packed linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Host microseconds of one call of ``what``: 20th, 50th, 80th percentile over batches."""

    case: str
    what: str
    us_p20: float | None
    us_p50: float | None
    us_p80: float | None
    reach: float | None = None
    stretch: float | None = None
    gpu: str = ""
    torch: str = ""
    triton: str = ""
    git: str = ""
    date: str = ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="update docs/kernels.md")
    parser.add_argument("--csv", type=Path, default=ROOT / "artifacts" / "bench" / "host.csv")
    parser.add_argument("--from", dest="source", type=Path, help="rows of an earlier run")
    parser.add_argument("--revision", help="what to record as the code's version", default=None)
    options = parser.parse_args(arguments)
    if options.source:
        rows = read(options.source, Row)
    elif not torch.cuda.is_available():
        print("benchmarks/host.py needs a CUDA GPU, and torch finds none", file=sys.stderr)
        return 1
    else:
        about = machine(options.revision) | {
            "date": str(datetime.datetime.now(datetime.UTC).date())
        }
        rows = list(measured(about))
        append(options.csv, rows)
    print(table(rows))
    if options.write:
        put(ROOT / "docs" / "kernels.md", "make bench-host", table(rows))
    return 0


@torch.no_grad()
def measured(about: Mapping[str, str]) -> Iterator[Row]:
    """Time every case: bf16, the packed linear, and what it consists of."""
    for kind, case in CASES:
        linear, x = random_linear(spec_for(kind, case.k, case.n)), random_rows(case.m, case.k)
        for what, call in parts(linear, x[None]):
            low, middle, high = host_time(call)
            asked = {"reach": case.reach, "stretch": case.stretch} if what == WHOLE else {}
            yield Row(
                case=str(case), what=what, us_p20=low, us_p50=middle, us_p80=high, **asked, **about
            )  # fmt: skip


def parts(linear: QuantLinear, x: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and make calls: each holds most of those that follow it."""
    plain = nn.Linear(x.shape[-1], linear.spec.outputs, device=x.device, dtype=x.dtype)
    packed = linear.packed()
    key = ops.format_key(linear.spec)
    compute = functools.partial(ops._by_plan, x, packed, key, None, "plain", None)
    yield "nn.Linear, bf16", functools.partial(plain, x)
    yield "computed, not recorded", compute
    yield WHOLE, functools.partial(linear, x)
    names = ("qweight", "wscale", "wglobal", "basis", "rotation", "wp", "bias")
    tensors = [getattr(packed, name) for name in names]
    operator = functools.partial(ops.quant_linear, x, *tensors, key, packed.smooth, packed.wpscale)
    yield "operator", operator
    inputs = (x, None, *packed)
    with Named(inputs, x.device) as recorder:
        y = compute()
    known = recorder.recording(y)
    if known is None:
        print(f"not recorded: {recorder.why}", file=sys.stderr)
        return
    addresses = [0 if t is None else t.data_ptr() for t in inputs]
    yield "launches repeated", lambda: known.repeat(list(addresses), inputs)
    new, stream = recording._new(x.device), recording.stream_of(x.device)
    made = [new(*layout) for layout in known.layouts]
    yield f"{len(made)} allocations", lambda: [new(*layout) for layout in known.layouts]
    everywhere = [*addresses, *(t.data_ptr() for t in made)]
    for name, launch in zip(recorder.names, known.launches, strict=True):
        yield f"launch of {name}", functools.partial(launch.on, stream, everywhere)
    tensors = [*inputs, *made]
    for operation in known.operations:
        name = operation.function.__name__
        yield f"operator {name}", functools.partial(_on_copy, operation, list(tensors))
        operation.on(tensors)


def _on_copy(operation: recording.Operation, tensors: list[Any]) -> None:
    operation.on(list(tensors))


class Named(Recorder):
    """A recorder that knows its kernels' names."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.names: list[str] = []

    def launched(self, compiled: Any, *more: Any) -> None:
        self.names.append(compiled.name)
        super().launched(compiled, *more)


def host_time(call: Callable[[], object]) -> tuple[float, float, float]:
    """Return percentiles 20, 50 and 80 of the microseconds until a call returns."""
    times = []
    for _ in range(BATCHES + 5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(BATCH):
            call()
        times.append((time.perf_counter() - begin) * 1e6 / BATCH)
    torch.cuda.synchronize()
    ordered = sorted(times[5:])
    return ordered[BATCHES // 5], statistics.median(ordered), ordered[-1 - BATCHES // 5]


def table(rows: Sequence[Row]) -> str:
    """Write Markdown: a section per case, a line for each of its parts."""
    lines = []
    for case, group in groupby(rows, key=lambda row: row.case):
        lines += [
            f"### Host time: {case}",
            "",
            "| | us of the host | reach / goal | |",
            "|---" * 4 + "|",
        ]
        for row in group:
            asked = "" if row.reach is None else f"{row.reach:g} / {row.stretch:g}"
            time = f"{row.us_p50:.1f} [{row.us_p20:.1f}, {row.us_p80:.1f}]"
            lines.append(f"| {row.what} | {time} | {asked} | {verdict(row)} |")
        lines.append("")
    first = rows[0]
    lines.append(
        f"{first.gpu}; torch {first.torch}, triton {first.triton}; {first.git[:12]}, {first.date}."
        "\nMedians; brackets: 20th and 80th percentile."
    )
    return "\n".join(lines) + "\n"


def verdict(row: Row) -> str:
    """Say how a time stands to what was asked."""
    if row.reach is None or row.stretch is None or row.us_p50 is None:
        return ""
    if row.us_p50 <= row.stretch:
        return "goal"
    return "reached" if row.us_p50 <= row.reach else "**missed**"


if __name__ == "__main__":
    sys.exit(main())
