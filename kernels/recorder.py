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

from .recording import Launch, Layout, Recording, launch_of, launcher_is_known, stream_of

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
        return known[0].repeat(addresses)
    with torch.cuda.device(x.device):
        return known[0].repeat(addresses)


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
        # Inputs, then allocations: alive to the end, so that no two have the same address.
        self._tensors = list(tensors)
        self._launches: list[Launch] = []
        self._product: tuple[tuple[Tensor, ...], tuple[Any, ...], Tensor] | None = None

    def __enter__(self) -> "Recorder":
        self._token = RECORDER.set(self)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        RECORDER.reset(self._token)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note allocations and the product; of all else only views, which do nothing, may run."""
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            self._tensors.append(result)
        elif func is torch.ops.aten._scaled_mm.default and self._product is None and not kwargs:
            self._product = args[:4], args[4:], result
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
        if self._product is not None:
            self._refuse("a kernel follows the product")
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

        What torch multiplies or the caller gets is allocated by itself, all else as regions of one
        workspace.
        """
        operands, options, result = self._product or ((), (), None)
        by_product = result is not None and result.data_ptr() == y.data_ptr()
        layouts: list[Layout] = []
        regions: dict[int, tuple[int, int]] = {}  # of tensors: allocation, offset
        for tensor in operands if by_product else (*operands, y):
            regions[self._whole(tensor)] = len(layouts), 0
            layouts.append((tuple(tensor.shape), tensor.stride(), tensor.dtype))
        size = 0
        for index in range(self._inputs, len(self._tensors)):
            if index not in regions:
                regions[index] = len(layouts), size
                size += -(-_extent(self._tensors[index]) // REGION) * REGION
        layouts += [((size,), (1,), torch.uint8)] if size else []
        if self.why is not None:
            return None

        def moved(tensor: int, offset: int) -> tuple[int, int]:
            if tensor < self._inputs:
                return tensor, offset
            allocation, begin = regions[tensor]
            return self._inputs + allocation, begin + offset

        launches = tuple(
            launch._replace(pointers=tuple((i, *moved(*place)) for i, *place in launch.pointers))
            for launch in self._launches
        )
        return Recording(
            device=self._device, layouts=tuple(layouts), launches=launches,
            forks=any(launch.beside for launch in launches),
            output=None if by_product else len(operands),
            product=tuple(range(len(operands))), options=options, shape=tuple(y.shape),
        )  # fmt: skip

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

    def _whole(self, tensor: Tensor) -> int:
        """Return which allocation this is all of, in whatever layout."""
        index, offset = self._at(tensor) or (0, 0)
        if index < self._inputs or offset or _extent(self._tensors[index]) != _extent(tensor):
            self._refuse("a tensor is no whole allocation")
        return index

    def _lies_in_known(self, result: Any) -> bool:
        if isinstance(result, list | tuple):
            return all(map(self._lies_in_known, result))
        if not isinstance(result, Tensor):
            return False
        known = [t for t in self._tensors if t is not None]
        known += [] if self._product is None else [self._product[2]]
        storages = [t.untyped_storage()._cdata for t in known]
        return result.untyped_storage()._cdata in storages


RECORDER: ContextVar[Recorder | None] = ContextVar("RECORDER", default=None)
"""Who notes the launches of this thread."""


def _extent(tensor: Tensor | None) -> int:
    """Return the bytes from a tensor's first element to its last."""
    if tensor is None or not tensor.numel():
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
