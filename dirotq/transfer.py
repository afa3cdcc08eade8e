"""Copies between host memory and a GPU, through page-locked memory.

The driver copies to and from other memory itself, piece by piece, and holds up meanwhile what other
threads launch: 0.2 s of a block of FLUX.1, whose sums are 0.6 GB. It is slower, too.
"""

import threading
from collections.abc import Iterator
from itertools import cycle

import torch
from torch import Tensor

SLAB = 32 << 20
"""Bytes of a piece; a thread that copies has two such pieces of page-locked memory."""
SMALL = 1 << 16
"""Bytes of a tensor that the driver copies at once, without waiting for anything."""


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor of host memory on ``device``, copied on the current stream.

    Kernels that use it may be queued on that stream at once.
    """
    where = torch.device(device)
    if where.type != "cuda" or tensor.nbytes <= SMALL:
        return tensor.to(where)
    made = torch.empty(tensor.shape, dtype=tensor.dtype, device=where)
    stream = torch.cuda.current_stream(made.device)
    slabs = cycle(_slabs(made.device))
    for (slab, free), (source, target) in zip(slabs, _pieces(tensor, made), strict=False):
        free.synchronize()
        target.copy_(slab[: len(source)].copy_(source), non_blocking=True)
        free.record(stream)
    return made


def download(tensor: Tensor) -> Tensor:
    """Return a tensor in host memory, once the current stream has come so far."""
    if tensor.device.type != "cuda" or tensor.nbytes <= SMALL:
        return tensor.cpu()
    made = torch.empty(tensor.shape, dtype=tensor.dtype)
    stream = torch.cuda.current_stream(tensor.device)
    (slab, free), _ = _slabs(tensor.device)
    free.synchronize()
    for source, target in _pieces(tensor, made):
        arrived = slab[: len(source)].copy_(source, non_blocking=True)
        stream.synchronize()
        target.copy_(arrived)
    return made


_own = threading.local()


def _slabs(device: torch.device) -> list[tuple[Tensor, torch.cuda.Event]]:
    """Return this thread's two slabs for a device, each with the event after which it is free."""
    own: dict[torch.device, list[tuple[Tensor, torch.cuda.Event]]]
    own = _own.__dict__.setdefault("slabs", {})
    if device not in own:
        slabs = (torch.empty(SLAB, dtype=torch.uint8, pin_memory=True) for _ in range(2))
        own[device] = [(slab, torch.cuda.Event()) for slab in slabs]
    return own[device]


def _pieces(source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the bytes of both, piece by piece."""
    flat = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (source, target))
    return zip(*(one.split(SLAB) for one in flat), strict=True)
