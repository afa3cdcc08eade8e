"""Linears of one input become one product; what differs in anything else stays apart."""

from typing import Any

import pytest
import torch
from compiling import compiling, linears
from tiny_packed import packed
from tiny_spec import tiny_spec
from torch import Tensor, nn

from dirotq.kernels.linear import SiteView
from dirotq.runtime import compiled

SLICES = slice(0, 16), slice(16, 32), slice(32, 48)


class Block(nn.Module):
    """Three views of one site, and a second site of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.site, self.other = packed(tiny_spec(rank=8)), packed(tiny_spec(rank=8), seed=1)
        self.q, self.k, self.v = (SiteView(self.site, rows) for rows in SLICES)
        self.how = "all"

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.how)(x)

    def all(self, x: Tensor) -> Tensor:
        return torch.cat([self.v(x), self.q(x), self.k(x)], -1)

    def neighbours(self, x: Tensor) -> Tensor:
        return torch.cat([self.v(x), self.k(x)], -1)

    def apart(self, x: Tensor) -> Tensor:
        return torch.cat([self.v(x), self.q(x)], -1)

    def inputs_differ(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x + 1)], -1)

    def sites_differ(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.other(x)], -1)

    def written_between(self, x: Tensor) -> Tensor:
        x = x.clone()
        q = self.q(x)
        x.mul_(2)
        return torch.cat([q, self.k(x)], -1)

    def written_by_an_overload(self, x: Tensor) -> Tensor:
        x = x.clone()
        q = self.q(x)
        torch.ops.aten.mul_.Tensor(x, 2)
        return torch.cat([q, self.k(x)], -1)

    def twice(self, x: Tensor) -> Tensor:
        return self.q(x) * self.q(x)


@pytest.mark.parametrize(
    ("how", "gone", "left"),
    [
        ("all", 2, [[0, 48]]),
        ("neighbours", 1, [[16, 48]]),
        ("apart", 0, [[32, 48], [0, 16]]),
        ("inputs_differ", 0, [[0, 16], [16, 32]]),
        ("sites_differ", 0, [[0, 16], None]),
        ("written_between", 0, [[0, 16], [16, 32]]),
        ("written_by_an_overload", 0, [[0, 16], [16, 32]]),
        ("twice", 0, [[0, 16], [0, 16]]),
    ],
)
def test_reads_are_joined(how: str, gone: int, left: list[Any]):
    block, x = Block(), torch.randn(2, 5, 64)
    block.how = how
    want = block(x)
    with compiling() as seen:
        call = compiled.Compiler(Block).call
        with torch.no_grad():
            torch.testing.assert_close(call(block, x), want)
    [graph] = seen.graphs
    assert seen["sites.rewrite"] == gone
    assert [node.args[11] if len(node.args) > 11 else None for node in linears(graph)] == left
