"""Directions of a packed linear's branch, made of low-rank updates such as LoRAs.

An update s B A reads the input itself. Its rows of A become further columns of the basis P, and
s B further columns of W P, in the rows that it changes (docs/method.md M8). They stay in the main
branch's input (``beside``), so codes and scales are computed as without them.

Letters: N outputs, D channels, R directions of the branch, r of the updates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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


class Directions(NamedTuple):
    """What an operator takes (kernels/ops.py).

    In bfloat16 they are the whole branch, [D, R + r] and [N, R + r], its own directions first.
    In float32 or float64 they are the updates alone, [D, r] and [N, r]: products of their own.
    """

    down: Tensor
    up: Tensor


@dataclass(slots=True)
class Group:
    """Parts of one A, by their places, and the columns that they share."""

    columns: slice
    parts: list[int]
    balance: Tensor | None = None
    """2^-e, float32 [r]: A was multiplied by 2^e"""


def made_of(
    parts: list[Part], scales: list[float], packed: Packed, spec: QuantSpec
) -> tuple[Directions, list[Group]]:
    """Make the directions of ``parts``, of a linear that holds ``packed``; and who has which."""
    device = packed.qweight.device
    values = [_loaded(part, device) for part in parts]
    groups = _grouped(parts, [down for down, _ in values])
    count = groups[-1].columns.stop
    wide = takes_directions(capability(device), spec, count)
    if wide and spec.can_append:
        wide = _balance(groups, parts, values, scales, packed)
    dtype = torch.bfloat16
    if not wide:
        kinds = [t.dtype for pair in values for t in pair]
        dtype = torch.float64 if torch.float64 in kinds else torch.float32
    lead = packed.rank if wide else 0
    down_Dr = torch.empty(spec.in_features, lead + count, dtype=dtype, device=device)
    up_Nr = torch.zeros(spec.outputs, lead + count, dtype=dtype, device=device)
    if lead and packed.basis is not None:
        down_Dr[:, :lead] = packed.basis
    if lead and packed.wp is not None:
        up_Nr[:, :lead] = packed.wp
    for group in groups:
        down = values[group.parts[0]][0]
        if group.balance is not None:
            down = down.float() / group.balance[:, None]
        down_Dr[:, lead:][:, group.columns] = down.mT
    _fill(up_Nr[:, lead:], groups, parts, [up for _, up in values], scales)
    return Directions(down_Dr, up_Nr), groups


def scale_again(
    directions: Directions, groups: list[Group], parts: list[Part], scales: list[float]
) -> None:
    """Write s B anew where it lies: CUDA graphs that read it stay right."""
    up = directions.up
    ups = [_loaded(part, up.device)[1] for part in parts]
    _fill(up[:, up.shape[1] - groups[-1].columns.stop :], groups, parts, ups, scales)


def _fill(
    out_Nr: Tensor, groups: list[Group], parts: list[Part], ups: list[Tensor], scales: list[float]
) -> None:
    """Write s B of every part into its rows and columns."""
    for group in groups:
        for i in group.parts:
            factor = scales[i] if group.balance is None else group.balance * scales[i]
            up = ups[i] if out_Nr.dtype == torch.bfloat16 else ups[i].to(out_Nr.dtype)
            torch.mul(up, factor, out=out_Nr[parts[i].rows, group.columns])


def _grouped(parts: list[Part], downs: list[Tensor]) -> list[Group]:
    """Give every part its columns; those of other outputs with an equal A share theirs."""
    groups: list[Group] = []
    for i, down in enumerate(downs):
        for group in groups:
            apart = all(_disjoint(parts[i].rows, parts[j].rows) for j in group.parts)
            if apart and _equal(down, downs[group.parts[0]]):
                group.parts.append(i)
                break
        else:
            start = groups[-1].columns.stop if groups else 0
            groups.append(Group(slice(start, start + len(down)), [i]))
    return groups


def _balance(
    groups: list[Group],
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
