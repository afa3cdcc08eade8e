"""Copies in threads, on a stream of their own.

On the stream of the calls a copy waits for all kernels that are queued there: seconds, of a block
of FLUX.1. Then nothing that a thread copies is there before the block has ended.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Aside:
    """A stream for one thread's copies to or from ``device``; on a CPU there is nothing to do.

    here = aside.mark()      # by the thread that computes: what is to be copied is queued
    with aside.after(here):  # by the other one
        host = download(tensor)

    with aside.after(None):  # what depends on no kernel
        tensor = upload(host, device)
    aside.hand_over([tensor])  # by the thread that computes, before it uses it
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def mark(self) -> torch.cuda.Event | None:
        """Return this point of the calling thread's stream; None on a CPU."""
        if self._stream is None:
            return None
        return torch.cuda.current_stream(self._device).record_event()

    @contextmanager
    def after(self, mark: torch.cuda.Event | None) -> Iterator[None]:
        """Copy what was there at ``mark``; at the end of the block everything has arrived."""
        if self._stream is None:
            yield
            return
        if mark is not None:
            self._stream.wait_event(mark)
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def hand_over(self, tensors: Iterable[Any]) -> None:
        """Let the calling thread's stream use what was made in :meth:`after`.

        Otherwise the memory of one that is dropped would be written to by the next copy while
        kernels that read it are still queued.
        """
        if self._stream is not None:
            caller = torch.cuda.current_stream(self._device)
            for tensor in tensors:
                if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                    tensor.record_stream(caller)
