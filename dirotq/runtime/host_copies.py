"""What a forward makes on the host and copies to the device: noted once, then read by its graph.

A CUDA graph can't hold a copy from pageable memory, and networks make tables there in each forward
(Qwen-Image's text lengths, Chroma's modulation indices, PixArt's positions at odd sizes). Operators
on the host run during a capture as always, so such a value can be looked at: where it is what it
was when the same call warmed up, the graph reads the device's copy of then.

A dispatch mode sees every copy, whichever function asked for it, also within compiled blocks. It
says that it ignores what a compiler makes of operators, as torch's own modes around captures do:
compiled code is then looked up and run as without it, and a block may even be compiled under it.
Without that word torch.compile skips or refuses a frame. A function mode would not do: its presence
is one of the guards of compiled code, so that every block would be compiled again for recording.

The mode also sees which tensors were there before: tables that a network remembers by shape
(``lru_cache``) may be forgotten while a graph still reads them. The graph holds them too.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .graph_call import NotGraphable

aten = torch.ops.aten

INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
MOVES_ITSELF = (*INDEXING, aten.where.self)
"""Operators that take tensors of the host beside those of the device, and copy them unseen."""
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
DYNAMIC = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
"""Of operators whose result depends on values: the host waits for them."""


class Noted(NamedTuple):
    """One value of the host that the device got: by which operator, what, and what came of it."""

    how: Any
    host: Tensor
    device: Tensor | None


class HostCopies(TorchDispatchMode):
    """Copies from the host to one kind of device, noted in order in a warm-up (:meth:`noting`) and
    handed out in the capture that follows (:meth:`repeating`).

    Both raise NotGraphable where the device's values are read back, and for weights that stay on
    the host, where they may be written to. :meth:`repeating` also does where the host's values,
    their number or their order are others than in the warm-up.
    """

    supports_higher_order_operators = True  # they run as they are

    def __init__(self, device_type: str, owned: Iterable[Tensor] = ()) -> None:
        """owned: weights, which a graph does not keep alive: it is dropped when they move."""
        super().__init__()
        self.device_type = device_type
        self.hosts = {"cpu"} - {device_type}
        self.owned = {_where(tensor) for tensor in owned} - {0}  # empty ones lie nowhere
        self.noted: list[Noted] = []
        self.taken: int | None = None  # None while noting
        self.read: set[int] = set()
        self.held: dict[int, Tensor] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note the copies of a warm-up."""
        self.noted.clear()
        self.taken = None
        with _constructors_seen(), self:
            yield

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """Give the copies of a capture what was noted."""
        self.taken = 0
        with _constructors_seen(), self:
            yield
        if self.taken != len(self.noted):
            raise NotGraphable(f"it copied {len(self.noted)} values of the host, now {self.taken}")

    def kept(self) -> list[Tensor]:
        """Return what a recorded graph reads, and has to live as long."""
        copies = [noted.device for noted in self.noted if noted.device is not None]
        return [*copies, *self.held.values()]

    @torch._disable_dynamo  # newer releases of torch do so themselves
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and _composite(func, self.device_type):
            with self:  # nothing has taken it apart before, as autograd does elsewhere
                return func._op_dk(COMPOSITE, *args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [t for t in tensors if t.device.type == self.device_type]
        on_host = [t for t in tensors if t.device.type in self.hosts]
        if func is aten._to_copy.default and on_host and self._goes_to(kwargs) == self.device_type:
            return self._copied(args[0], (func, kwargs), lambda: func(*args, **kwargs))
        for tensor in on_device:
            self._hold(tensor)
        if on_device:
            if self._reads_back(func, args, kwargs):
                raise NotGraphable(f"{func} reads values of the device back to the host")
            if func is aten.copy_.default and on_host:
                return func(args[0], self._moved(args[1], func, args[0].device))
            if func in MOVES_ITSELF and not _fills(func, args):
                args, kwargs = self._all_moved((args, kwargs), func, on_device[0].device)
            else:
                # A number of the host becomes an argument of the kernel, which the graph repeats.
                for number in on_host:
                    self._check(number, func)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            error.add_note(f"in {func}")  # CUDA says that a capture failed, not what failed it
            raise

    def _reads_back(self, func: Any, args: Any, kwargs: Any) -> bool:
        if func is aten._to_copy.default:
            return self._goes_to(kwargs) in self.hosts
        if func is aten.copy_.default:
            return args[0].device.type in self.hosts
        if func in INDEXING:
            return any(_is_mask(index) for index in args[1]) and not _fills(func, args)
        if func is aten.repeat_interleave.Tensor:
            return kwargs.get("output_size") is None
        return any(tag in getattr(func, "tags", ()) for tag in DYNAMIC)

    @staticmethod
    def _goes_to(kwargs: Any) -> str | None:
        device = kwargs.get("device")
        return None if device is None else torch.device(device).type

    def _hold(self, tensor: Tensor) -> None:
        # What a capture makes lies in memory of its own, never where a warm-up read.
        where = _where(tensor)
        if self.taken is None:
            self.read.add(where)
        elif where and where in self.read and where not in self.owned:
            self.held[where] = tensor

    def _moved(self, value: Tensor, how: Any, device: torch.device) -> Tensor:
        if value.device.type not in self.hosts:
            return value
        return self._copied(value, (how, device), lambda: value.to(device))

    def _all_moved(self, arguments: Any, how: Any, device: torch.device) -> Any:
        return tree_map_only(Tensor, lambda t: self._moved(t, how, device), arguments)

    def _copied(self, host: Tensor, how: Any, copy: Callable[[], Tensor]) -> Tensor:
        """Copy to the device: really, or by a copy of what it got in the warm-up. The forward may
        write into the result."""
        self._refuse_weight(host, how)
        if self.taken is None:
            made = copy()
            # CogView4 copies one table four times in each block: it is kept once.
            alike = (n for n in self.noted if n.how == how and _same_bits(n.host, host))
            self.noted.append(next(alike, None) or Noted(how, host.clone(), made.clone()))
            return made
        kept = self._same(host, how).device
        assert kept is not None
        return kept.clone()

    def _check(self, host: Tensor, how: Any) -> None:
        """Note a value that the device gets without a copy, or hold it against the noted one."""
        self._refuse_weight(host, how)
        if self.taken is None:
            self.noted.append(Noted(how, host.clone(), None))
        else:
            self._same(host, how)

    def _refuse_weight(self, host: Tensor, how: Any) -> None:
        if _where(host) in self.owned:
            func = how[0] if isinstance(how, tuple) else how
            raise NotGraphable(f"{func} reads a weight that is not on the device")

    def _same(self, host: Tensor, how: Any) -> Noted:
        assert self.taken is not None
        noted = self.noted[self.taken] if self.taken < len(self.noted) else None
        if noted is None or noted.how != how or not _same_bits(noted.host, host):
            raise NotGraphable("values that it makes on the host change from call to call")
        self.taken += 1
        return noted


@contextmanager
def _constructors_seen() -> Iterator[None]:
    """Let ``torch.tensor(..., device=...)`` and its like make a tensor of the host and copy that
    where modes see it (as torch's FakeTensorMode does)."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


@functools.cache
def _composite(func: Any, device_type: str) -> bool:
    """Tell whether an operator is computed by calling others."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    own = {"cpu": "CPU", "meta": "Meta"}.get(device_type, device_type.upper())
    return has(func.name(), COMPOSITE) and not has(func.name(), own)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _fills(func: Any, args: Any) -> bool:
    """Tell whether an ``index_put`` is a ``masked_fill`` to torch, which need not count the mask:
    one mask of the device, and a number of the host."""
    if func not in INDEXING or len(args) < 3:
        return False
    index = [index for index in args[1] if index is not None]
    number = args[2].device.type == "cpu" and args[2].numel() == 1
    if not number or len(index) != 1 or not _is_mask(index[0]):
        return False
    return bool(index[0].device == args[0].device)


def _where(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Compare bits: NaN equals itself, and 0 is not -0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(value: Tensor) -> Tensor:
    return value.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
