"""How time on a GPU is measured, by tuning and by every benchmark: the same for all contestants."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

LEAST, MOST = 4, 200
"""Calls in one graph: enough to share the cost of launching it, and a bound on building it."""

REST = 5.0
"""Pause after each replay, in times its duration."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call: median, and the 20th and 80th percentiles."""

    p20: float
    p50: float
    p80: float


def copies(bytes_per_call: int, cache: int | None = None) -> int:
    """Return how many calls on data of their own push one another's inputs out of the L2 cache.

    bytes_per_call  bytes of activations and weights that one call reads
    cache           bytes of L2; None: the current GPU's
    """
    if cache is None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(MOST, max(LEAST, math.ceil(2 * cache / bytes_per_call)))


def time_calls(
    calls: Sequence[Callable[[], object]], *, repeats: int = 20, limit: float = math.inf
) -> Timing:
    """Time one of ``calls`` on the GPU alone: all of them in one CUDA graph, between two events.

    In a graph, so that small kernels are not measured by how fast Python launches them; on
    different data (:func:`copies` says how many), so that nothing is warm that wouldn't be in a
    network; many in one graph, so that its own launch (a few us) hardly counts. Between replays the
    GPU rests (``REST``): under steady load it lowers its clock, by how much depends on what ran
    before, and the last contestant would pay for the first.

    limit  microseconds per call above which one replay is enough: the caller has lost interest
    """
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    _replay(graph)
    times: list[float] = []
    while len(times) < repeats and not (times and times[-1] > limit):
        took = _replay(graph)
        times.append(took / len(calls))
        time.sleep(min(REST * took * 1e-6, 0.1))
    return summary(times)


def summary(times: Sequence[float]) -> Timing:
    """Return median and percentiles of measured times."""
    ordered, fifth = sorted(times), len(times) // 5
    return Timing(ordered[fifth], statistics.median(ordered), ordered[-1 - fifth])


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """Time one replay, in microseconds."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3
