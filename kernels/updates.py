"""Low-rank updates of a packed linear, such as LoRAs, as further directions of its branch.

An update s B A reads the input itself. Its rows of A become further columns of the basis P, and
s B further columns of W P, in the rows that it changes (docs/method.md M8). They stay in the main
branch's input (``beside``), so codes and scales are computed as without them.

Letters: N outputs, D channels, R directions of the branch, r of the updates.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .appended import LIMIT
from .buffers import Packed
from .chip import capability
from .formats.spec import QuantSpec
from .plan import takes_directions

ROOM = 4.0
"""By how much scales may grow until directions are balanced anew."""


class Part(NamedTuple):
    """An update s B A of some outputs."""

    rows: slice
    down: Tensor
    """A, [r, D], floating; or a 1x1 convolution's, [r, D, 1, 1]"""
    up: Tensor
    """B, [rows, r], likewise"""
    scale: float | Tensor
    load: Callable[[], tuple[Tensor, Tensor]] | None = None
    """Returns A and B where ``down`` and ``up`` are offloaded."""


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


class Directions(NamedTuple):
    """What an operator takes (kernels/ops.py).

    In bfloat16 they are the whole branch, [D, R + r] and [N, R + r], its own directions first.
    In float32 or float64 they are the updates alone, [D, r] and [N, r]: products of their own.
    """

    down: Tensor
    up: Tensor


@dataclass(slots=True)
class _Group:
    """Parts of one A: the columns that they share."""

    columns: slice
    parts: list[int]
    balance: Tensor | None = None
    """2^-e, float32 [r]: A was multiplied by 2^e"""


@dataclass(slots=True)
class _Made:
    """What directions were made of."""

    weights: list[Any]
    scales: list[Any]
    held: list[Part]
    """Keeps tensors alive, by whose identity ``weights`` tells them apart."""
    groups: list[_Group]
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
            weights, scales = [device, *_weights(parts)], [_scale(part) for part in parts]
            made = self._made
            if made is None or made.weights != weights or self.made is None:
                self._make(parts, weights, scales, packed, spec)
            elif made.scales != scales:
                self._scale_again(made, parts, scales, packed, spec)
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
    def _make(
        self,
        parts: list[Part],
        weights: list[Any],
        scales: list[Any],
        packed: Packed,
        spec: QuantSpec,
    ) -> None:
        device = packed.qweight.device
        values = [_loaded(part, device) for part in parts]
        groups = _grouped(parts, [down for down, _ in values])
        count = groups[-1].columns.stop
        wide = takes_directions(capability(device), spec, count)
        numbers = [float(part.scale) for part in parts]
        if wide and spec.can_append:
            wide = _balance(groups, parts, values, numbers, packed)
        dtype = torch.bfloat16
        if not wide:
            kinds = [t.dtype for pair in values for t in pair]
            dtype = torch.float64 if torch.float64 in kinds else torch.float32
        lead = packed.rank if wide else 0
        down_Dr = torch.empty(spec.in_features, lead + count, dtype=dtype, device=device)
        if lead and packed.basis is not None:
            down_Dr[:, :lead] = packed.basis
        for group in groups:
            down = values[group.parts[0]][0]
            if group.balance is not None:
                down = down.float() / group.balance[:, None]
            down_Dr[:, lead:][:, group.columns] = down.mT
        up_Nr = _ups(groups, parts, [up for _, up in values], numbers, packed, spec, dtype, lead)
        self.made = Directions(down_Dr, up_Nr)
        largest = [max(abs(number), 1.0) * ROOM for number in numbers]
        self._made = _Made(weights, scales, parts, groups, largest)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _scale_again(
        self,
        made: _Made,
        parts: list[Part],
        scales: list[Any],
        packed: Packed,
        spec: QuantSpec,
    ) -> None:
        """Write s B anew where it lies: CUDA graphs that read it stay right."""
        numbers = [float(part.scale) for part in parts]
        if any(abs(n) > most for n, most in zip(numbers, made.largest, strict=True)):
            self._make(parts, made.weights, scales, packed, spec)
            return
        assert self.made is not None
        up = self.made.up
        ups = [_loaded(part, up.device)[1] for part in parts]
        _fill(up[:, up.shape[1] - made.groups[-1].columns.stop :], made.groups, parts, ups, numbers)
        made.scales = scales


def _fill(
    out_Nr: Tensor, groups: list[_Group], parts: list[Part], ups: list[Tensor], scales: list[float]
) -> None:
    """Write s B of every part into its rows and columns."""
    for group in groups:
        for i in group.parts:
            factor = scales[i] if group.balance is None else group.balance * scales[i]
            up = ups[i] if out_Nr.dtype == torch.bfloat16 else ups[i].to(out_Nr.dtype)
            torch.mul(up, factor, out=out_Nr[parts[i].rows, group.columns])


def _ups(
    groups: list[_Group],
    parts: list[Part],
    ups: list[Tensor],
    scales: list[float],
    packed: Packed,
    spec: QuantSpec,
    dtype: torch.dtype,
    lead: int,
) -> Tensor:
    """Return W P and, behind it, s B of every part in its rows, [N, lead + r]."""
    count = groups[-1].columns.stop
    out_Nr = torch.zeros(spec.outputs, lead + count, dtype=dtype, device=packed.qweight.device)
    if lead and packed.wp is not None:
        out_Nr[:, :lead] = packed.wp
    _fill(out_Nr[:, lead:], groups, parts, ups, scales)
    return out_Nr


def _grouped(parts: list[Part], downs: list[Tensor]) -> list[_Group]:
    """Give every part its columns; those of other outputs with an equal A share theirs."""
    groups: list[_Group] = []
    for i, down in enumerate(downs):
        for group in groups:
            apart = all(_disjoint(parts[i].rows, parts[j].rows) for j in group.parts)
            if apart and _equal(down, downs[group.parts[0]]):
                group.parts.append(i)
                break
        else:
            start = groups[-1].columns.stop if groups else 0
            groups.append(_Group(slice(start, start + len(down)), [i]))
    return groups


def _balance(
    groups: list[_Group],
    parts: list[Part],
    values: list[tuple[Tensor, Tensor]],
    scales: list[float],
    packed: Packed,
) -> bool:
    """Move powers of two between A and B, so that FP8 columns hold both; tell whether they can.

    A direction of c is about |A| / 11 in FP8 (kernels/appended.py), where a row's step is a
    twentieth of 7 root mean squares, and one of B at most |B| / wscale. Four times the latter
    for the former lets both lie about as far from FP8's smallest numbers.
    """
    wscale_N1, held = packed.wscale.float(), []
    for group in groups:
        a = values[group.parts[0]][0].float().norm(dim=1)
        b = torch.zeros_like(a)
        for i in group.parts:
            up = values[i][1].float().abs() * max(abs(scales[i]), 1.0)
            b = b.maximum(torch.where(up == 0, 0.0, up / wscale_N1[parts[i].rows]).amax(0))
        least = (b * ROOM / LIMIT).log2().ceil()
        exponent = ((4 * b / a).log2() / 2).round().maximum(least)
        some = (a > 0) & (b > 0)
        group.balance = torch.exp2(-torch.where(some, exponent, 0.0))
        held.append(b.isfinite().all() & a.isfinite().all())
    if bool(torch.stack(held).all()):
        return True
    for group in groups:
        group.balance = None
    return False


def _loaded(part: Part, device: torch.device) -> tuple[Tensor, Tensor]:
    down, up = (part.down, part.up) if part.load is None else part.load()
    return down.to(device).flatten(1), up.to(device).flatten(1)


def _disjoint(a: slice, b: slice) -> bool:
    return bool(a.stop <= b.start or b.stop <= a.start)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and (a is b or torch.equal(a, b))


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
