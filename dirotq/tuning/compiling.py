"""Compile kernels before they are timed: most of the time goes there, and it can be shared."""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from dirotq.kernels.chip import capability
from dirotq.kernels.linear import QuantLinear
from dirotq.kernels.plan import name_of

from .fastest import Shape, call, plans
from .random_linear import random_linear, random_rows

Job = list[tuple[Shape, str]]
"""Shapes, each with the name of a plan, for one process."""
WORKER_BYTES = 3 << 30
"""GPU memory that a worker may take: a CUDA context, and one large linear."""
LINE_SECONDS = 10.0
"""Between two lines that say how far compiling is."""


def compile_all(
    shapes: Sequence[Shape], chip: int, deadline: float, say: Callable[[str], object]
) -> None:
    """Run everything once in worker processes, which share Triton's cache on disk.

    What all plans of a width have in common first, one process per width and number of rows; then
    every plan in one process per remainder of the width by a step (the kernels differ by that).
    What is not compiled at the deadline (``time.monotonic``) is compiled when it is timed.
    """
    workers = count_workers()
    first, then = jobs(shapes, chip)
    if workers < 2 or not then:
        return
    done, total, spoke = 0, len(first) + len(then), time.monotonic()
    say(f"compiling in {workers} processes, {total} jobs")
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        for phase in (first, then):
            # Longest first, so that none is left over at the end.
            running = [pool.submit(run_once, job) for job in sorted(phase, key=len, reverse=True)]
            for future in as_completed(running, max(0.0, deadline - time.monotonic())):
                if error := future.exception():  # it died, or got no context on the GPU
                    say(f"a worker failed ({error}); what is left is compiled when timed")
                    return
                done += 1
                if (now := time.monotonic()) > spoke + LINE_SECONDS:
                    say(f"compiled {done} of {total}")
                    spoke = now
    except TimeoutError:
        say(f"out of time to compile: {total - done} jobs are left to the timing")
    finally:
        pool.shutdown(cancel_futures=True)


def jobs(shapes: Sequence[Shape], chip: int) -> tuple[list[Job], list[Job]]:
    """Return what comes first, and all plans, cut so that no two processes compile the same."""
    common: dict[Any, Job] = {}
    every: dict[Any, Job] = {}
    for shape in shapes:
        kind, m, _, k = shape.key
        names = [name_of(plan) for plan in plans(shape, chip)]
        for name in names:
            every.setdefault((kind, k % 256, name), []).append((shape, name))
        if shape.spec.activations.bits < 16:
            ends = {name.split("-")[0]: name for name in names}  # one plan of every engine
            common.setdefault((k, m), []).extend((shape, name) for name in ends.values())
    return list(common.values()), list(every.values())


def count_workers() -> int:
    """Return how many processes the machine's cores and the GPU's free memory allow."""
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(16, os.cpu_count() or 1, free // WORKER_BYTES))


def run_once(job: Job) -> None:
    """Compile by running, in a worker. What fails here fails again, and is said, when timed."""
    chip = capability(torch.device("cuda", torch.cuda.current_device()))
    assert chip is not None
    linears: dict[Any, QuantLinear] = {}
    for shape, name in job:
        try:
            if shape.spec not in linears:
                linears[shape.spec] = random_linear(shape.spec)
            linear = linears[shape.spec]
            plan = {name_of(p): p for p in plans(shape, chip)}[name]
            call(plan, linear, random_rows(shape.m, shape.spec.in_features))()
            torch.cuda.synchronize()
        except Exception:  # noqa: BLE001 - compilers raise anything
            continue
