"""The launches of a packed linear, to be repeated at other addresses: what a call costs the host.

A call chooses a plan, makes configurations and goes through Triton's Python, ten times as long as
the driver takes to launch. All of that depends on the kind of its tensors alone (shapes, strides,
dtypes, alignment, device), not on where they lie: :mod:`.recorder` notes it once per kind.
"""

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chip import say_once
from .side_stream import side_stream

TRITONS = ("3.5.", "3.6.", "3.7.")
"""Versions whose launchers were read. ``CompiledKernel.run`` is an object. It is called with a grid
of three, the stream, the function, its metadata, three of hooks and all arguments in the kernel's
order, and calls its ``launch``, which is C, with these and its own. An integer is a pointer."""

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Size, strides and dtype of an allocation."""


class Launch(NamedTuple):
    """A kernel's launch but for its stream and addresses."""

    run: Callable[..., None]
    arguments: tuple[Any, ...]
    stream: int
    """Which argument the stream is."""
    inner: int
    """Where arguments begin that are passed as one sequence; 0: all are passed by themselves."""
    pointers: tuple[tuple[int, int, int], ...]
    """(argument, tensor, bytes behind its address); allocations count on behind the inputs"""
    beside: bool
    """Whether it runs on the side stream, beside what precedes it."""

    def on(self, stream: int, addresses: Sequence[int]) -> None:
        """Launch on a stream, by its handle, with tensors at ``addresses``."""
        filled = list(self.arguments)
        filled[self.stream] = stream
        for argument, tensor, offset in self.pointers:
            filled[argument] = addresses[tensor] + offset
        if self.inner:
            self.run(*filled[: self.inner], filled[self.inner :])
        else:
            self.run(*filled)


def _scaled_mm(*arguments: Any) -> Tensor:
    return torch._scaled_mm(*arguments)


OPERATIONS: dict[str, Callable[..., Any] | None] = {
    "aten::_scaled_mm": _scaled_mm,
    "aten::addmm_": Tensor.addmm_,
    "humming::launch_kernel.out": None,
}
"""Operators that may end a recording, with a faster way to call one than as an operator."""


class Operand(NamedTuple):
    """A tensor that an operator of torch takes, or that the caller gets."""

    tensor: int
    """Which one: inputs, then allocations, then what operators returned."""
    layout: tuple[tuple[int, ...], tuple[int, ...], int] | None
    """Size, strides and elements behind its start; None: the tensor as it is."""

    def of(self, tensors: Sequence[Any]) -> Tensor:
        found: Tensor = tensors[self.tensor]
        if self.layout is None:
            return found
        size, strides, behind = self.layout
        return found.as_strided(size, strides, found.storage_offset() + behind)


class Operation(NamedTuple):
    """A call of torch's, behind all launches."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    """Tensors as operands."""
    new: bool
    """Whether it returns memory of its own."""

    @classmethod
    def of(cls, operator: Any, arguments: Iterable[Any]) -> "Operation":
        function = OPERATIONS[operator.name()] or operator
        return cls(function, tuple(arguments), not operator._schema.is_mutable)

    def on(self, tensors: list[Any]) -> None:
        """Call it; what it returns of its own joins ``tensors``."""
        given = [a.of(tensors) if isinstance(a, Operand) else a for a in self.arguments]
        result = self.function(*given)
        if self.new:
            tensors.append(result)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """All launches of one kind of call. It holds no tensor that a call works on."""

    device: torch.device
    layouts: tuple[Layout, ...]
    """What is allocated."""
    launches: tuple[Launch, ...]
    forks: bool
    """Whether one of them is beside."""
    operations: tuple[Operation, ...]
    """What torch computes in the end."""
    output: Operand

    def repeat(self, addresses: list[int], inputs: Sequence[Tensor | None]) -> Tensor:
        """Launch all with inputs at ``addresses`` (changed) on the current device and stream."""
        new, stream = _new(self.device), stream_of(self.device)
        tensors = [*inputs, *(new(*layout) for layout in self.layouts)]
        addresses += [t.data_ptr() for t in tensors[len(inputs) :] if t is not None]
        if self.forks:
            caller, side = torch.cuda.current_stream(self.device), side_stream(self.device)
            side.wait_event(caller.record_event())
        for launch in self.launches:
            launch.on(side.cuda_stream if launch.beside else stream, addresses)
        if self.forks:
            caller.wait_stream(side)
        for operation in self.operations:
            operation.on(tensors)
        return self.output.of(tensors)


def launch_of(
    compiled: Any,
    grid: tuple[int, ...],
    values: Sequence[Any],
    pointers: Sequence[tuple[int, int, int]],
    beside: bool,
) -> Launch | None:
    """Return a kernel's launch as its launcher would make it, without its Python: called with
    another ``launch``, it says what it hands on. None where that isn't as ``TRITONS`` do it.

    values    all arguments; pointers: (which, tensor, offset) of those that are addresses
    """
    run: Any = compiled.run
    if getattr(run, "global_scratch_size", 0) or getattr(run, "profile_scratch_size", 0):
        return None  # allocated by Triton for every launch
    probe, handed, stream = copy.copy(run), [], object()
    probe.launch = lambda *arguments: handed.extend(arguments)
    probe(
        *(*grid, 1, 1)[:3], stream, compiled.function, compiled.packed_metadata, None, None, None,
        *values,
    )  # fmt: skip
    inner = len(handed) - 1 if isinstance(handed[-1], tuple) else 0
    if inner:
        handed[inner:] = handed[inner]
    first = len(handed) - len(values)
    streams = [at for at, argument in enumerate(handed) if argument is stream]
    same = all(a is b for a, b in zip(handed[max(first, 0) :], values, strict=False))
    if first < 0 or len(streams) != 1 or not same:
        return None
    (at,) = streams
    handed[at] = None
    moved = tuple((first + place, tensor, offset) for place, tensor, offset in pointers)
    return Launch(run.launch, tuple(handed), at, inner, moved, beside)


def launcher_is_known(compiled: Any) -> bool:
    """Tell whether a kernel is launched as ``TRITONS`` do: not if it is interpreted (None)."""
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
