"""`make tune`: times every plan of this GPU on a grid of shapes, for kernels/plans.json.

usage: python benchmarks/tune.py [--formats w4a4 ...] [--m 1 4096 ...] [--k 3072 ...] [--n ...]
           [--workers 16] [--seconds 200] [--into kernels/plans.json]

Compiling takes most of the time, so worker processes do that first: every plan of every shape once,
into Triton's cache on disk. One process then times. A plan that fails to compile or computes
something else is skipped with a line. Shapes that are not timed keep their rows in the table.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dirotq.benchmarks.gpu_timing import Timing, copies, time_calls
from dirotq.benchmarks.random_linear import (
    FORMATS,
    Checker,
    random_linear,
    random_rows,
    read_bytes,
    spec_for,
)
from dirotq.kernels.chip import capability
from dirotq.kernels.linear import QuantLinear
from dirotq.kernels.plan import TABLE, Plan, candidates_for, choose, name_of

ROWS = (1, 4, 16, 64, 256, 512, 1024, 4608, 18432)
BLOCKS = (
    # FLUX: qkv, qkv + mlp, mlp up, mlp down, attention out, single block's out
    (3072, 9216), (3072, 21504), (3072, 12288), (12288, 3072), (3072, 3072), (15360, 3072),
    # PixArt: qkv, mlp up, mlp down, out; SANA: qkv, mlp up, mlp down
    (1152, 3456), (1152, 4608), (4608, 1152), (1152, 1152),
    (2240, 6720), (2240, 11200), (5600, 2240),
)  # fmt: skip
"""(K, N) of the sites in blocks."""
MODULATORS = ((3072, 18432), (3072, 9216), (1152, 6912), (2240, 13440))
W4A16_BLOCKS = ((3072, 9216), (12288, 3072), (1152, 4608))
FEW = 64
"""At W4A16, up to so many rows modulators are measured, and blocks above."""

Entry = dict[str, Any]
Table = dict[str, dict[str, list[Entry]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A linear K -> N in one of FORMATS, on M rows."""

    kind: str
    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.kind} {self.k} -> {self.n}, M = {self.m}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    for letter in "mkn":
        parser.add_argument(f"--{letter}", nargs="+", type=int, help="only these")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop timing after")
    parser.add_argument("--into", type=Path, default=TABLE)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/tune.py needs a CUDA GPU, and torch finds none", file=sys.stderr)
        return 1
    begin = time.monotonic()
    chip = capability(torch.device("cuda", torch.cuda.current_device()))
    assert chip is not None
    shapes = list(grid(options.formats, options.m, options.k, options.n))
    compile_all(shapes, chip, options.workers)
    print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    found = measure(shapes, chip, begin + options.seconds)
    table = json.loads(options.into.read_text()) if options.into.is_file() else {}
    options.into.write_text(dumped(merged(table, chip, found)))
    print(f"{len(found)} of {len(shapes)} shapes in {time.monotonic() - begin:.0f} s")
    return 0


def grid(
    kinds: Iterable[str],
    m: Sequence[int] | None = None,
    k: Sequence[int] | None = None,
    n: Sequence[int] | None = None,
) -> Iterator[Shape]:
    """List the shapes to time, most important ones first; m, k and n restrict them."""
    for kind in kinds:
        for rows in reversed(ROWS):
            if kind == "w4a16":
                pairs = (MODULATORS if rows <= FEW else ()) + (W4A16_BLOCKS if rows > FEW else ())
            else:
                pairs = BLOCKS
            for width, outputs in pairs:
                wanted = zip((m, k, n), (rows, width, outputs), strict=True)
                if all(only is None or value in only for only, value in wanted):
                    yield Shape(kind=kind, m=rows, n=outputs, k=width)


def plans(shape: Shape, chip: int) -> list[Plan]:
    """List candidates worth timing: none whose tile is far taller or far lower than the rows."""
    spec = spec_for(shape.kind, shape.k, shape.n)
    if choose(chip, shape.m, shape.n, spec, torch.bfloat16).engine == "reference":
        return []
    found = candidates_for(chip, shape.m, shape.n, spec, torch.bfloat16)
    low, high = min(shape.m, 1024) / 16, max(32, 2 * shape.m)
    return [p for p in found if p.tile is None or low <= p.tile.bm <= high]


def compile_all(shapes: Sequence[Shape], chip: int, workers: int) -> None:
    """Run everything once in worker processes, which share Triton's cache on disk.

    What all plans of a width have in common first, one process per width and number of rows; then
    every plan in one process per remainder of the width by a step (the kernels differ by that).
    """
    jobs: dict[Any, list[tuple[Shape, str]]] = {}
    common: dict[Any, list[tuple[Shape, str]]] = {}
    for shape in shapes:
        names = [name_of(plan) for plan in plans(shape, chip)]
        for name in names:
            jobs.setdefault((shape.kind, shape.k % 256, name), []).append((shape, name))
        if shape.kind != "w4a16":
            ends = {name.split("-")[0]: name for name in names}  # one plan of every engine
            common.setdefault((shape.k, shape.m), []).extend((shape, n) for n in ends.values())
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            for phase in (common, jobs):
                # Longest first, so that none is left over at the end.
                list(pool.map(run_once, sorted(phase.values(), key=len, reverse=True)))
    except BrokenProcessPool as error:
        print(f"a worker died ({error}); what is not compiled yet is compiled when timed")


def run_once(jobs: Sequence[tuple[Shape, str]]) -> None:
    """Compile by running, in a worker. What fails here fails again, and is said, when timed."""
    chip = capability(torch.device("cuda", torch.cuda.current_device()))
    assert chip is not None
    linears: dict[tuple[str, int, int], QuantLinear] = {}
    for shape, name in jobs:
        key = shape.kind, shape.k, shape.n
        try:
            if key not in linears:
                linears[key] = random_linear(spec_for(*key))
            plan = {name_of(p): p for p in plans(shape, chip)}[name]
            call(plan, linears[key], random_rows(shape.m, shape.k))()
            torch.cuda.synchronize()
        except Exception:  # noqa: BLE001 - compilers raise anything
            continue


def measure(
    shapes: Iterable[Shape], chip: int, deadline: float
) -> dict[Shape, list[tuple[Plan, Timing]]]:
    """Time the plans of every shape; fastest first."""
    found: dict[Shape, list[tuple[Plan, Timing]]] = {}
    for shape in shapes:
        if time.monotonic() > deadline:
            print("out of time: the shapes left keep the rows they have")
            break
        candidates = plans(shape, chip)
        if not candidates:
            print(f"{shape}: the kernels don't take it")
            continue
        timed = race(shape, candidates)
        if timed:
            found[shape] = timed
            plan, best = timed[0]
            after = f"; then {timed[1][1].p50:.1f} {name_of(timed[1][0])}" if timed[1:] else ""
            print(f"{shape}: {best.p50:.1f} us {name_of(plan)}{after}", flush=True)
    return found


def race(shape: Shape, candidates: Sequence[Plan]) -> list[tuple[Plan, Timing]]:
    """Time every candidate that gives the right result; fastest first."""
    linear = random_linear(spec_for(shape.kind, shape.k, shape.n))
    x = random_rows(shape.m, shape.k)
    checker = Checker(linear, x)
    count = copies(read_bytes(linear) + 2 * x.numel())
    # Only tensors differ from copy to copy: what they hold is the same.
    data = [(linear, x)] + [(_clone(linear), x.clone()) for _ in range(count - 1)]
    timed: list[tuple[Plan, Timing]] = []
    for plan in candidates:
        try:
            if problem := checker.problem(call(plan, linear, x)()):
                print(f"{shape}: skipped {name_of(plan)}: {problem}")
                continue
            best = min((t.p50 for _, t in timed), default=math.inf)
            timing = time_calls([call(plan, *own) for own in data], repeats=7, limit=1.3 * best)
        except Exception as error:  # noqa: BLE001 - compilers raise anything
            print(f"{shape}: skipped {name_of(plan)}: {str(error).strip()[-200:]}")
            torch.cuda.synchronize()  # raises if the GPU's context is lost: nothing after counts
            continue
        timed.append((plan, timing))
    return sorted(timed, key=lambda pair: pair[1].p50)


def call(plan: Plan, linear: QuantLinear, x: Tensor) -> Callable[[], Tensor]:
    from dirotq.kernels import engine

    return partial(engine.linear, plan, x, linear.packed(), linear.spec)


def entries(shape: Shape, timed: Sequence[tuple[Plan, Timing]]) -> list[Entry]:
    """Return the table's rows of a shape: the fastest plan and, if that takes bf16 alone
    (``scaled_mm``), the fastest of the others, for calls in fp16."""
    others = [pair for pair in timed if pair[0].engine != "scaled_mm"]
    wanted = [timed[0], *(others[:1] if timed[0][0].engine == "scaled_mm" else [])]
    return [
        {"m": shape.m, "n": shape.n, "k": shape.k, "plan": name_of(p), "us": round(t.p50, 1)}
        for p, t in wanted
    ]


def merged(table: Table, chip: int, found: Mapping[Shape, Sequence[tuple[Plan, Timing]]]) -> Table:
    """Put the shapes that were timed in place of what the table had of them."""
    kinds = {kind: list(rows) for kind, rows in table.get(str(chip), {}).items()}
    for shape, timed in found.items():
        mine = shape.m, shape.n, shape.k
        kept = [r for r in kinds.get(shape.kind, []) if (r["m"], r["n"], r["k"]) != mine]
        kinds[shape.kind] = kept + entries(shape, timed)
    for rows in kinds.values():
        rows.sort(key=lambda row: (row["k"], row["n"], row["m"]))  # stable: fastest first
    return {**table, str(chip): kinds}


def dumped(table: Table) -> str:
    """Write JSON with a line per row."""
    chips = []
    for chip, kinds in sorted(table.items()):
        lines = [
            f'  "{kind}": [\n' + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
            for kind, rows in kinds.items()
        ]
        chips.append(f' "{chip}": {{\n' + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(chips) + "\n}\n"


def _clone(linear: QuantLinear) -> QuantLinear:
    twin = QuantLinear(linear.spec, bias=linear.bias is not None, device="cuda")
    twin.load_state_dict(linear.state_dict())
    return twin


if __name__ == "__main__":
    sys.exit(main())
