"""Work cut so that no two processes compile the same kernel, by as many as fit."""

import os
import time

import pytest
import torch

from dirotq.kernels.plan import name_of
from dirotq.tuning import compiling
from dirotq.tuning.compiling import WORKER_BYTES, compile_all, count_workers, jobs
from dirotq.tuning.fastest import Shape, plans
from dirotq.tuning.random_linear import spec_for

WIDE, NARROW, ODD = (Shape(spec_for("w4a4", k, 3072), 4608) for k in (3072, 1024, 1152))


@pytest.mark.parametrize(
    ("free", "cores", "workers"),
    [(140 << 30, 64, 16), (140 << 30, 4, 4), (24 << 30, 64, 8), (WORKER_BYTES - 1, 64, 1)],
)
def test_workers_fit_cores_and_memory(monkeypatch, free, cores, workers):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 0))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert count_workers() == workers


def test_every_plan_is_in_one_job_per_remainder_of_the_width():
    _, every = jobs([WIDE, NARROW, ODD], 90)
    names = [name_of(plan) for plan in plans(WIDE, 90)]
    assert len(every) == 2 * len(names)  # 3072 and 1024 leave the same rest
    together = [job for job in every if len(job) == 2]
    assert [{shape for shape, _ in job} for job in together] == [{WIDE, NARROW}] * len(names)


def test_one_plan_of_every_engine_comes_first():
    first, _ = jobs([WIDE, ODD], 90)
    assert [{name.split("-")[0] for _, name in job} for job in first] == [
        {"scaled_mm", "packed", "unpacked"}
    ] * 2
    assert jobs([Shape(spec_for("w4a16", 3072, 3072), 1)], 90)[0] == []


def ran(job):
    """In place of run_once."""


def slept(job):
    time.sleep(2)


def died(job):
    os._exit(1)


def failed(job):
    raise RuntimeError("all CUDA-capable devices are busy or unavailable")


@pytest.mark.parametrize(
    ("work", "seconds", "said"),
    [
        (ran, 60, None),
        (slept, 0.1, "out of time to compile"),
        (died, 60, "a worker failed"),
        (failed, 60, "a worker failed (all CUDA-capable devices are busy"),
    ],
)
def test_what_is_not_compiled_is_left_to_the_timing(monkeypatch, work, seconds, said):
    monkeypatch.setattr(compiling, "count_workers", lambda: 2)
    monkeypatch.setattr(compiling, "run_once", work)
    monkeypatch.setattr(compiling.multiprocessing, "get_context", _fork)
    lines = []
    compile_all([WIDE], 90, time.monotonic() + seconds, lines.append)
    assert lines[0].startswith("compiling in 2 processes, ")
    assert [said in line for line in lines[1:]] == [True] * (said is not None)


def test_compiling_says_how_far_it_is(monkeypatch):
    monkeypatch.setattr(compiling, "count_workers", lambda: 2)
    monkeypatch.setattr(compiling, "run_once", ran)
    monkeypatch.setattr(compiling.multiprocessing, "get_context", _fork)
    monkeypatch.setattr(compiling, "LINE_SECONDS", -1.0)
    lines = []
    compile_all([WIDE], 90, time.monotonic() + 60, lines.append)
    total = sum(map(len, jobs([WIDE], 90)))
    assert lines[1:] == [f"compiled {done} of {total}" for done in range(1, total + 1)]


def _fork(method, real=compiling.multiprocessing.get_context):
    assert method == "spawn"  # CUDA refuses forks
    return real("fork")


def test_one_process_compiles_while_it_times(monkeypatch):
    monkeypatch.setattr(compiling, "count_workers", lambda: 1)
    monkeypatch.setattr(compiling, "ProcessPoolExecutor", None)
    compile_all([WIDE], 90, 0.0, pytest.fail)
