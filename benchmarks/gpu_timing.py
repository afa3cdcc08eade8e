"""How every GPU benchmark here measures time."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSH_BYTES = 256 * 2**20
"""More than any chip's L2 cache: written before each call, so that no input is still in it."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call: median, and the 20th and 80th percentiles."""

    p20: float
    p50: float
    p80: float


def time_call(call: Callable[[], object], *, repeats: int = 30) -> Timing:
    """Time on the GPU alone: the call's kernels replayed as a CUDA graph, between two events.

    A graph, so that small kernels are not measured by how fast Python launches them. Inputs come
    from memory, not from the L2 cache. The graph's own launch (about 3 us) is included.
    """
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    times.sort()
    return Timing(times[repeats // 5], statistics.median(times), times[-1 - repeats // 5])
