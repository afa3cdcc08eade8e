"""A second stream for work that can run beside the caller's."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@functools.lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def fork(device: torch.device) -> torch.cuda.Event | None:
    """Mark this point of the current stream; None on a CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


@contextmanager
def beside(start: torch.cuda.Event | None) -> Iterator[None]:
    """Run on a second stream what depends on nothing after ``start``; the caller's stream waits.

    All memory is the caller's: allocated before, handed on after the join. The caching allocator
    thus gives the same scratch to one linear after the other, also in a CUDA graph: a workspace as
    large as the largest linear needs, and no larger. Allocate nothing within.
    """
    if start is None:
        yield
        return
    caller = torch.cuda.current_stream()
    side = _side_stream(caller.device)
    side.wait_event(start)
    with torch.cuda.stream(side):
        yield
    caller.wait_stream(side)
