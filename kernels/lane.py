"""Further streams for work that can run beside the caller's."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@functools.lru_cache
def _side_stream(device: torch.device, caller: int, purpose: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _side(purpose: str) -> torch.cuda.Stream:
    """The stream that stands beside the current one; lanes of two callers don't meet."""
    caller = torch.cuda.current_stream()
    return _side_stream(caller.device, caller.cuda_stream, purpose)


def fork(device: torch.device) -> torch.cuda.Event | None:
    """This point of the current stream; None on a CPU."""
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
    caller, side = torch.cuda.current_stream(), _side("beside")
    side.wait_event(start)
    with torch.cuda.stream(side):
        yield
    caller.wait_stream(side)


@contextmanager
def alongside(device: torch.device) -> Iterator[None]:
    """Run on a second stream what depends on all so far, until :func:`rejoin`.

    Here memory may be allocated. It goes back to the second stream when Python lets go of it, which
    is safe as each ``alongside`` begins after all work of the caller that was launched before. What
    the caller allocated and this reads has to be held until after :func:`rejoin`.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        side = _side("alongside")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            yield


def rejoin(device: torch.device) -> None:
    """The caller's stream waits for what ran :func:`alongside` it."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.current_stream().wait_stream(_side("alongside"))
