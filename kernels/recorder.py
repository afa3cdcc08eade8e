"""Record a packed linear's launches when its kind is called for the first time, then repeat them.

What is no sequence of known launches (other torch operators, tensor descriptors, another Triton)
runs as always: right, and slower.
"""

import functools
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .recording import (
    OPERATIONS,
    Launch,
    Layout,
    Operand,
    Operation,
    Recording,
    launch_of,
    launcher_is_known,
    stream_of,
)

log = logging.getLogger(__name__)

KINDS = 1024
"""Kinds of calls that are kept: the least recently used one goes."""

REGION = 256
"""Bytes that regions of the workspace are aligned to: no less than a kernel finds of a tensor."""

ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)


def recorded(
    kind: Hashable, tensors: Sequence[Tensor | None], compute: Callable[[], Tensor]
) -> Tensor:
    """Return ``compute()``, by the launches that it made for tensors of this kind before.

    kind     all that ``compute`` depends on, but for where its tensors lie and which are absent
    tensors  all that it reads, on the device of the first one; those whose strides are not part of
             ``kind`` must be contiguous
    """
    if _watched():
        return compute()
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    lines = tuple([address & 15 if address else None for address in addresses])
    x = tensors[0]
    assert x is not None
    # Whether there is a side stream is another question while a graph is captured.
    known = _known((kind, lines, x.is_cuda and torch.cuda.is_current_stream_capturing()))
    if not known:
        with Recorder(tensors, x.device) as recorder:
            y = compute()
        known.append(recorder.recording(y))
        if recorder.why is not None:
            log.debug("the launches of a packed linear are not repeated: %s", recorder.why)
        return y
    if known[0] is None:
        return compute()
    if not x.is_cuda or torch.cuda.current_device() == x.device.index:
        return known[0].repeat(addresses, tensors)
    with torch.cuda.device(x.device):
        return known[0].repeat(addresses, tensors)


def forget() -> None:
    """Forget all recordings: calls choose their kernels anew."""
    _known.cache_clear()


@functools.lru_cache(maxsize=KINDS)
def _known(kind: Hashable) -> list[Recording | None]:
    """Return what is known of a kind: nothing yet, its recording, or that it has none (None)."""
    return []


@functools.cache
def _runtime() -> Any:
    """Return Triton's settings of launches; None without a Triton that has them."""
    try:
        from triton import knobs
    except ImportError:
        return None
    return knobs.runtime


def _watched() -> bool:
    """Tell whether somebody watches Triton's launches, as its profiler does, or nothing can."""
    runtime = _runtime()
    if runtime is None:
        return True
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Recorder(TorchDispatchMode):
    """Notes, while it is entered, what ``Config.launch`` runs and what torch does.

    why  what can't be repeated; None if all can
    """

    def __init__(self, tensors: Sequence[Tensor | None], device: torch.device) -> None:
        super().__init__()
        self.why: str | None = None
        self._device = device
        self._stream = stream_of(device)
        self._inputs = len(tensors)
        # Inputs, then allocations and what operators returned: alive to the end, so that no two
        # have the same address.
        self._tensors = list(tensors)
        self._launches: list[Launch] = []
        self._operations: list[tuple[Any, tuple[Any, ...]]] = []
        self._returned: list[int] = []

    def __enter__(self) -> "Recorder":
        self._token = RECORDER.set(self)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        RECORDER.reset(self._token)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note allocations and the last operations; of all else only views, which do nothing, may
        run."""
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            self._tensors.append(result)
        elif func.name() in OPERATIONS and not kwargs:
            self._operations.append((func, args))
            if not func._schema.is_mutable:
                self._returned.append(len(self._tensors))
                self._tensors.append(result)
        elif func._schema.is_mutable or not self._lies_in_known(result):
            self._refuse(f"{func} ran")
        return result

    def launched(
        self,
        compiled: Any,
        grid: tuple[int, ...],
        names: Sequence[str],
        arguments: Sequence[Any],
        constants: Mapping[str, Any],
    ) -> None:
        """Note that ``compiled`` ran: what its kernel's argument ``names`` are, and were given."""
        if self._operations:
            self._refuse("a kernel follows what torch computes")
        if not launcher_is_known(compiled):
            self._refuse("how its kernels are launched is not known")
            return
        given, values, pointers = iter(arguments), [], []
        for place, name in enumerate(names):
            value = constants[name] if name in constants else next(given)
            if isinstance(value, Tensor):
                if (found := self._at(value)) is not None:
                    pointers.append((place, *found))
                value = None
            elif name not in constants and not isinstance(value, int | float | None):
                self._refuse(f"a kernel takes a {type(value).__name__}")
            values.append(value)
        if self.why is not None:
            return
        beside = stream_of(self._device) != self._stream
        launch = launch_of(compiled, grid, values, pointers, beside)
        if launch is None:
            self._refuse("a kernel's launcher is another one")
        else:
            self._launches.append(launch)

    def recording(self, y: Tensor) -> Recording | None:
        """Return what a call did that returned y; None if it can't be repeated.

        What torch works on or the caller gets is allocated by itself, all else as regions of one
        workspace.
        """
        operations = [
            (func, [self._operand(a) if self._is_here(a) else a for a in args])
            for func, args in self._operations
        ]
        output = self._operand(y)
        taken = {a.tensor for _, args in operations for a in args if _is_operand(a)}
        taken.add(output.tensor)
        # Where everything will be: inputs, what is allocated by itself, the workspace, the rest.
        made = [i for i in range(self._inputs, len(self._tensors)) if i not in self._returned]
        own = [i for i in made if i in taken]
        places, size = {index: (self._inputs + i, 0) for i, index in enumerate(own)}, 0
        for index in made:
            if index not in taken:
                places[index] = self._inputs + len(own), size
                size += -(-_extent(self._tensors[index]) // REGION) * REGION
        layouts = [_layout(self._tensors[i]) for i in own]
        layouts += [((size,), (1,), torch.uint8)] if size else []
        behind = self._inputs + len(layouts)
        places |= {index: (behind + i, 0) for i, index in enumerate(self._returned)}
        if self.why is not None:
            return None

        def moved(tensor: int, offset: int) -> tuple[int, int]:
            place, begin = places.get(tensor, (tensor, 0))
            return place, begin + offset

        def placed(argument: Any) -> Any:
            if not _is_operand(argument):
                return argument
            return argument._replace(tensor=moved(argument.tensor, 0)[0])

        launches = tuple(
            launch._replace(pointers=tuple((i, *moved(*place)) for i, *place in launch.pointers))
            for launch in self._launches
        )
        return Recording(
            device=self._device, layouts=tuple(layouts), launches=launches,
            forks=any(launch.beside for launch in launches),
            operations=tuple(Operation.of(func, map(placed, args)) for func, args in operations),
            output=placed(output),
        )  # fmt: skip

    def _operand(self, tensor: Tensor) -> Operand:
        """Return a tensor as a known one or as a part of it, of the same dtype."""
        index, offset = self._at(tensor) or (0, 0)
        base, layout = _layout(self._tensors[index]), _layout(tensor)
        if base[2] != layout[2]:
            self._refuse("an operand is of another dtype than its memory")
        same = not offset and base == layout
        return Operand(index, None if same else (*layout[:2], offset // tensor.element_size()))

    def _is_here(self, argument: Any) -> bool:
        return isinstance(argument, Tensor) and argument.device == self._device

    def _refuse(self, why: str) -> None:
        self.why = self.why or why

    def _at(self, tensor: Tensor) -> tuple[int, int] | None:
        """Return the one known tensor that starts where this one does, or else lies around its
        start, and the bytes between."""
        address = tensor.data_ptr()
        known = [(i, t, t.data_ptr()) for i, t in enumerate(self._tensors) if t is not None]
        found = [(i, 0) for i, _, start in known if start == address] or [
            (i, address - start) for i, t, start in known if start < address < start + _extent(t)
        ]
        if len(found) == 1:
            return found[0]
        self._refuse(f"a kernel's argument lies in {len(found)} tensors")
        return None

    def _lies_in_known(self, result: Any) -> bool:
        if isinstance(result, list | tuple):
            return all(map(self._lies_in_known, result))
        if not isinstance(result, Tensor):
            return False
        known = [t for t in self._tensors if t is not None]
        storages = [t.untyped_storage()._cdata for t in known]
        return result.untyped_storage()._cdata in storages


RECORDER: ContextVar[Recorder | None] = ContextVar("RECORDER", default=None)
"""Who notes the launches of this thread."""


def _is_operand(argument: Any) -> bool:
    return isinstance(argument, Operand)


def _layout(tensor: Tensor | None) -> Layout:
    assert tensor is not None
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _extent(tensor: Tensor | None) -> int:
    """Return the bytes from a tensor's first element to its last."""
    if tensor is None or not tensor.numel():
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
