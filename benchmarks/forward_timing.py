"""One contestant's forward: its first call, its time afterwards, its memory, its kernels."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dirotq.benchmarks.kernel_categories import Kernel
from dirotq.tuning.timing import REST, Timing, summary

WARM_UP = 3
"""Calls before the first that counts: compilation, capture of graphs, workspaces."""
CALLS = ((150, 20), (1000, 10), (float("inf"), 5))
"""Calls that are timed, by milliseconds of one."""
LONGEST_REST = 0.1


@dataclass(frozen=True)
class Forward:
    """Milliseconds of a call, seconds of the first one, bytes at its peak, its result."""

    ms: Timing
    first_s: float
    peak: int
    reserved: int
    output: Tensor


def timed(module: Any, x: Mapping[str, Any]) -> Forward:
    """Time calls one by one, from before Python's part to the end of the last kernel.

    Between calls the GPU rests as long for everyone (gpu_timing.REST). Peaks are of the warm-up,
    which includes whatever a contestant does once.

    Raises RuntimeError if the result is not finite.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds, output = first(module, x)
    if not bool(output.isfinite().all()):
        raise RuntimeError("the result is not finite")
    output = output.clone()  # a graph's next replay would overwrite it
    took = [_one(module, x) for _ in range(WARM_UP - 1)][-1]
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    times: list[float] = []
    for _ in range(next(count for limit, count in CALLS if took < limit)):
        time.sleep(min(REST * took * 1e-3, LONGEST_REST))
        took = _one(module, x)
        times.append(took)
    return Forward(summary(times), seconds, *peaks, output)


def first(module: Any, x: Mapping[str, Any]) -> tuple[float, Tensor]:
    """Return the seconds of a first call, and its result."""
    began = time.perf_counter()
    output = call(module, x)
    torch.cuda.synchronize()
    return time.perf_counter() - began, output


def call(module: Any, x: Mapping[str, Any]) -> Tensor:
    """Run a forward; a list with a result per image becomes one tensor."""
    with torch.no_grad():
        output = module(**x)[0]
    return torch.stack(output) if isinstance(output, list) else output


def kernels(module: Any, x: Mapping[str, Any]) -> list[Kernel]:
    """Every kernel of one warm call, as the profiler saw it; those of a graph's replay too.

    Raises RuntimeError if it saw none.
    """
    call(module, x)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call(module, x)
        torch.cuda.synchronize()
    found = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in trace.events() or ()
        if event.device_type == DeviceType.CUDA and not _annotation(event)
    ]
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    return found


def _annotation(event: Any) -> bool:
    """Whether it is a span that the profiler draws over kernels, and no kernel."""
    marked = getattr(event, "is_user_annotation", False)
    return marked or event.name.startswith(("ProfilerStep", "## ", "Torch-Compiled"))


def _one(module: Any, x: Mapping[str, Any]) -> float:
    """Milliseconds of one call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call(module, x)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
