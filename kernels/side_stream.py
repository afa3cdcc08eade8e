"""A second stream for work that can run beside the caller's."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WORTH = 2**35
"""Multiply-adds from which a side stream is worth its 10 us of the host's time. Below, a linear
takes the GPU less than about 70 us (at 10^15 operations a second), and the host's launches are what
is waited for."""


def fork(device: torch.device, products: int) -> torch.cuda.Event | None:
    """Mark this point of the current stream; None on a CPU, and if what follows has fewer than
    WORTH ``products``, unless a graph is captured: its replay costs the host nothing."""
    if device.type != "cuda":
        return None
    if products < WORTH and not torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(device).record_event()


@contextmanager
def beside(start: torch.cuda.Event | None) -> Iterator[None]:
    """Run on a side stream what depends on nothing after ``start``; the caller's stream waits.

    All memory is the caller's: allocated before, handed on after the join. The caching allocator
    thus gives the same scratch to one linear after the other, also in a CUDA graph: a workspace as
    large as the largest linear needs, and no larger. Allocate nothing within.
    """
    if start is None:
        yield
        return
    caller = torch.cuda.current_stream()
    side = side_stream(caller.device)
    side.wait_event(start)
    with torch.cuda.stream(side):
        yield
    caller.wait_stream(side)


@functools.lru_cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the device's side stream, the same for all callers."""
    return torch.cuda.Stream(device)
