"""The launches of a packed linear, to be repeated at other addresses: what a call costs the host.

A call chooses a plan, makes configurations and goes through Triton's Python, ten times as long as
the driver takes to launch. All of that depends on the kind of its tensors alone (shapes, strides,
dtypes, alignment, device), not on where they lie: :mod:`.recorder` notes it once per kind.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chip import say_once
from .side_stream import side_stream

TRITONS = ("3.5.", "3.6.", "3.7.")
"""Versions whose launchers were read: ``CompiledKernel.run`` takes a grid of three, the stream, the
function, its metadata, three of hooks, and all arguments in the kernel's order; an integer is a
pointer. A newer version is added when its launcher has been read."""

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Size, strides and dtype of an allocation."""


class Launch(NamedTuple):
    """A kernel's launch but for its stream and addresses."""

    run: Callable[..., None]
    grid: tuple[int, int, int]
    function: Any
    metadata: Any
    arguments: tuple[Any, ...]
    pointers: tuple[tuple[int, int, int], ...]
    """(argument, tensor, bytes behind its address); allocations count on behind the inputs"""
    beside: bool
    """Whether it runs on the side stream, beside what precedes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """All launches of one kind of call. It holds no tensor."""

    device: torch.device
    layouts: tuple[Layout, ...]
    """What is allocated."""
    launches: tuple[Launch, ...]
    forks: bool
    """Whether one of them is beside."""
    output: int | None
    """The allocation that is returned; None: the product's result is."""
    product: tuple[int, ...]
    """Allocations that ``torch._scaled_mm`` multiplies in the end, with their scales."""
    options: tuple[Any, ...]
    """Its further arguments."""
    shape: tuple[int, ...]
    """Of its result."""

    def repeat(self, addresses: list[int]) -> Tensor:
        """Launch all with inputs at ``addresses`` (changed) on the current device and stream."""
        new, stream = _new(self.device), stream_of(self.device)
        made = [new(*layout) for layout in self.layouts]
        addresses += [t.data_ptr() for t in made]
        if self.forks:
            caller, side = torch.cuda.current_stream(self.device), side_stream(self.device)
            side.wait_event(caller.record_event())
        for run, grid, function, metadata, arguments, pointers, beside in self.launches:
            filled = list(arguments)
            for argument, tensor, offset in pointers:
                filled[argument] = addresses[tensor] + offset
            there = side.cuda_stream if beside else stream
            run(*grid, there, function, metadata, None, None, None, *filled)
        if self.forks:
            caller.wait_stream(side)
        if self.output is not None:
            return made[self.output]
        multiply: Callable[..., Tensor] = torch._scaled_mm
        return multiply(*[made[i] for i in self.product], *self.options).view(self.shape)


def launcher_is_known(compiled: Any) -> bool:
    """Tell whether a kernel can be launched as ``TRITONS`` do; an interpreted one was never
    compiled."""
    if compiled is None:
        return False
    import triton

    if triton.__version__.startswith(TRITONS):
        return True
    versions = ", ".join(version.rstrip(".") for version in TRITONS)
    say_once(
        f"outside of CUDA graphs packed linears take the host ten times as long as they could: "
        f"how triton {triton.__version__} launches kernels is not known; use one of {versions}",
        logging.WARNING,
    )
    return False


def stream_of(device: torch.device) -> int:
    """Return the current stream's handle; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return int(torch._C._cuda_getCurrentRawStream(device.index))


@functools.cache
def _new(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """Return what allocates there: the call of Inductor's own code, twice as fast as torch's."""
    fast: Any = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
    if fast is not None and device.type == "cuda":
        return fast
    return lambda size, strides, dtype: torch.empty_strided(
        size, strides, dtype=dtype, device=device
    )
