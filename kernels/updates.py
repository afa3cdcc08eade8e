"""The updates of a packed linear's outputs: whose they are, and when they have changed.

What is made of them is in kernels/directions.py.
"""

import operator
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .buffers import Packed
from .directions import ROOM, Directions, Group, Part, made_of, scale_again
from .formats.spec import QuantSpec


class Source(Protocol):
    """Who updates a linear, as it now is."""

    def parts(self) -> Iterable[Part]:
        """Return the updates, as tensors that are only looked at."""
        ...

    def state(self) -> Any:
        """Return what is equal as long as ``parts`` are, but for values that are written in place.

        Looked at before every call, and before every replay of a CUDA graph: at little cost.
        """
        ...


@dataclass(slots=True)
class _Made:
    """What directions were made of."""

    weights: list[Any]
    scales: list[Any]
    held: list[Part]
    """Keeps tensors alive, by whose identity ``weights`` tells them apart."""
    groups: list[Group]
    largest: list[float]


class Updates:
    """The updates of one packed linear, and the directions made of them."""

    def __init__(self) -> None:
        self.made: Directions | None = None
        self.current = True
        """False: whoever changed something said so, and nothing was made since."""
        self._sources: list[weakref.ref[Any]] = []
        self._fixed: list[Part] = []
        self._made: _Made | None = None
        self._turn = 0
        """How often directions were made, or were found to be none."""
        self._held: list[Tensor] = []
        """Aliases of what directions were made of: nothing else gets its address meanwhile."""
        self._written: list[Tensor] = []
        """Those that count how often they are written in place."""
        self._seen: Any = None

    def attach(self, source: Source) -> None:
        """Let a source update the linear as long as it lives."""
        if not any(known() is source for known in self._sources):
            self._sources.append(weakref.ref(source))
        self.current = False

    def detach(self) -> None:
        """Forget all sources; what was fixed stays."""
        self._sources.clear()
        self.current = False

    def fix(self, parts: Iterable[Part]) -> None:
        """Keep updates whatever becomes of their source."""
        self._fixed += parts
        self.current = False

    def release(self, parts: Iterable[Part]) -> None:
        """Undo :meth:`fix`, with the same objects."""
        gone = set(map(id, parts))
        self._fixed = [part for part in self._fixed if id(part) not in gone]
        self.current = False

    @property
    def fixed(self) -> tuple[Part, ...]:
        return tuple(self._fixed)

    def stamp(self) -> Any:
        """Return what is equal as long as the directions are right and :meth:`stale` is false:
        written values show here."""
        return self.current, self._turn, [tensor._version for tensor in self._written]

    def stale(self) -> bool:
        """Tell whether someone said, or a source shows, that the directions are to be renewed."""
        return not self.current or self._seen is None or self._seen[1] != self._sources_now()

    def _sources_now(self) -> list[Any]:
        return [alive.state() for known in self._sources if (alive := known()) is not None]

    def forget_made(self) -> None:
        """Make the directions anew at the next call: weights were written unseen."""
        self._made = None
        self.current = False

    def renew(self, packed: Packed, spec: QuantSpec) -> None:
        """Make the directions if something has changed."""
        device, before = packed.qweight.device, self.made
        if self.current and self._seen == self._look(device):
            return
        parts = self._parts()
        if not parts:
            self.made = self._made = None
        elif device.type != "meta":
            self._make(parts, packed, spec)
        found = [t for p in parts for t in (p.down, p.up, p.scale) if isinstance(t, Tensor)]
        self._held = [tensor.detach() for tensor in found]
        self._written = [alias for alias in self._held if not alias.is_inference()]
        self._turn += self.made is not before
        self.current = True
        self._seen = self._look(device)

    def _look(self, device: torch.device) -> Any:
        """Return what tells, at little cost, whether anything has changed."""
        return device, self._sources_now(), list(map(id, self._fixed)), self.stamp()

    def moved(self, move: Callable[[Tensor], Tensor]) -> None:
        """Take the directions along to another device."""
        if self.made is not None:
            self.made = Directions(*map(move, self.made))

    def __getstate__(self) -> dict[str, Any]:
        # Sources attach again: those of a copy are copies.
        fresh = vars(Updates()) | {"current": False}
        return fresh | {"_fixed": self._fixed}

    def _parts(self) -> list[Part]:
        found = list(self._fixed)
        for source in self._sources:
            if (alive := source()) is not None:
                found += alive.parts()
        return found

    @torch.inference_mode(False)
    @torch.no_grad()
    def _make(self, parts: list[Part], packed: Packed, spec: QuantSpec) -> None:
        """Make the directions; where scales alone have changed, write only what they multiply."""
        weights, scales = [packed.qweight.device, *_weights(parts)], [_scale(p) for p in parts]
        known = self._made if self._made and self._made.weights == weights else None
        if known and known.scales == scales:
            return
        numbers = [float(part.scale) for part in parts]
        if known and self.made and not any(map(operator.gt, map(abs, numbers), known.largest)):
            scale_again(self.made, known.groups, parts, numbers)
            known.scales = scales
            return
        self.made, groups = made_of(parts, numbers, packed, spec)
        largest = [max(abs(number), 1.0) * ROOM for number in numbers]
        self._made = _Made(weights, scales, parts, groups, largest)


def _weights(parts: list[Part]) -> list[Any]:
    return [(p.rows.start, p.rows.stop, *_which(p.down, p), *_which(p.up, p)) for p in parts]


def _which(tensor: Tensor, part: Part) -> tuple[int, int, int | None]:
    """Return what tells a matrix from another, or from itself with other values."""
    # An offloaded one moves for every call; `tensor.data = other` moves one that is not.
    address = 0 if part.load is not None or tensor.is_meta else tensor.data_ptr()
    return id(tensor), address, _version(tensor)


def _scale(part: Part) -> Any:
    if isinstance(part.scale, Tensor):
        return id(part.scale), _version(part.scale)
    return float(part.scale)  # NumPy's numbers compare with a pair one by one


def _version(tensor: Tensor) -> int | None:
    """Return how often a tensor was written in place; inference tensors don't know."""
    return None if tensor.is_inference() else tensor._version
