"""Updates of a packed linear that a test sets by hand."""

from dataclasses import dataclass

import torch
from formats import DEVICE, random_linear
from torch import Tensor

from dirotq.kernels.directions import Part
from dirotq.kernels.linear import QuantLinear

ROWS = slice(0, 48), slice(48, 80), slice(80, 96)
SHAPE = {"dim": 320, "rows": (96,), "block": 64, "act_group": 64, "weight_group": 64}


@dataclass(eq=False)
class Adapter:
    """A source: ``found`` is what it updates the linear with; replace its entries."""

    found: list[Part]

    def parts(self) -> list[Part]:
        return self.found

    def state(self) -> list[int]:
        return list(map(id, self.found))


def part(rows: slice, dim: int, rank: int = 4, scale: float = 0.5, seed: int = 0, **like) -> Part:
    """An update of these rows, by random matrices."""
    draw = torch.Generator().manual_seed(seed + rows.start)
    down = torch.randn(rank, dim, generator=draw, dtype=torch.float64)
    up = torch.randn(rows.stop - rows.start, rank, generator=draw, dtype=torch.float64)
    return Part(rows, down.to(DEVICE, **like) / dim**0.5, up.to(DEVICE, **like), scale)


def delta(linear: QuantLinear, parts: list[Part]) -> Tensor:
    """What updates add to the weight, [N, D]."""
    total = torch.zeros(linear.spec.outputs, linear.in_features, dtype=torch.float64, device=DEVICE)
    for one in parts:
        total[one.rows] += one.scale * one.up.double() @ one.down.double()
    return total


def adapted(spec, parts: list[Part]) -> tuple[QuantLinear, Adapter]:
    """A linear, and what updates it."""
    linear, adapter = random_linear(spec), Adapter(parts)
    linear.adapted().attach(adapter)
    return linear, adapter
