"""GELU goes into the linear that reads it, and nowhere else."""

from typing import Any

import pytest
import torch
from compiling import compiling, linears
from tiny_packed import packed
from tiny_spec import tiny_spec
from torch import Tensor, nn
from torch.nn import functional as F

from dirotq.runtime import compiled


class Block(nn.Module):
    def __init__(self, how: str, **spec: Any) -> None:
        super().__init__()
        self.how, self.linear = how, packed(tiny_spec(rank=8, **spec))

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.how)(x)

    def gelu(self, x: Tensor) -> Tensor:
        return self.linear(F.gelu(x, approximate="tanh"))

    def dropped(self, x: Tensor) -> Tensor:
        return self.linear(F.dropout(F.gelu(x, approximate="tanh"), 0.5, training=False))

    def dropping(self, x: Tensor) -> Tensor:
        return self.linear(F.dropout(F.gelu(x, approximate="tanh"), 1.0, training=True))

    def concat(self, x: Tensor) -> Tensor:
        return self.linear(torch.cat([x[..., :16], F.gelu(x[..., 16:], approximate="tanh")], -1))

    def concat_by_number(self, x: Tensor) -> Tensor:
        return self.linear(torch.cat([x[..., :16], F.gelu(x[..., 16:], approximate="tanh")], 2))

    def other_order(self, x: Tensor) -> Tensor:
        return self.linear(torch.cat([F.gelu(x[..., 16:], approximate="tanh"), x[..., :16]], -1))

    def rows(self, x: Tensor) -> Tensor:
        return self.linear(torch.cat([x, F.gelu(x, approximate="tanh")], 1))

    def erf(self, x: Tensor) -> Tensor:
        return self.linear(F.gelu(x))

    def read_elsewhere(self, x: Tensor) -> Tensor:
        y = F.gelu(x, approximate="tanh")
        return self.linear(y) + y.sum()

    def gelu_read_elsewhere(self, x: Tensor) -> Tensor:
        y = F.gelu(x[..., 16:], approximate="tanh")
        return self.linear(torch.cat([x[..., :16], y], -1)) + y.sum()


@pytest.mark.parametrize(
    ("how", "prologue"),
    [
        ("gelu", "gelu"),
        ("dropped", "gelu"),
        ("concat", "concat"),
        ("concat_by_number", "concat"),
        ("dropping", None),
        ("other_order", None),
        ("rows", None),
        ("erf", None),
        ("read_elsewhere", None),
        ("gelu_read_elsewhere", None),
    ],
)
def test_what_a_linear_computes_on_the_way_in(how: str, prologue: str | None):
    block, x = Block(how), torch.randn(2, 5, 64)
    want = block(x)
    with compiling() as seen, torch.no_grad():
        torch.testing.assert_close(compiled.Compiler(Block).call(block, x), want)
    [graph] = seen.graphs
    [linear] = linears(graph)
    assert linear.kwargs.get("prologue") == prologue
    names = {str(node.target) for node in graph.graph.nodes}
    assert any("gelu" in name for name in names) == (prologue is None)


def test_sixteen_bits_are_read_once_and_gain_nothing():
    block, x = Block("gelu", act_bits=16), torch.randn(2, 5, 64)
    with compiling() as seen, torch.no_grad():
        compiled.Compiler(Block).call(block, x)
    assert seen["prologues.rewrite"] == 0
