"""Graphs that a pass has rewritten, run as they stand."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dirotq.runtime.passes.norm_rope import OPERATOR, rewrite


class Rewriting:
    """A backend that runs rewritten graphs as they stand."""

    def __init__(self, *, anywhere: bool = True) -> None:
        self.anywhere = anywhere
        self.calls: list[Any] = []
        """Arguments of the operator wherever it was put."""
        self.counts: list[int] = []

    def __call__(self, module: torch.fx.GraphModule, example_inputs: Any) -> Any:
        self.counts.append(rewrite(module, anywhere=self.anywhere))
        module.graph.lint()
        module.recompile()
        nodes = module.graph.find_nodes(op="call_function", target=OPERATOR)
        self.calls += [node.args for node in nodes]
        return module.forward


def compiled(function: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], Rewriting]:
    torch._dynamo.reset()
    backend = Rewriting(**options)
    return torch.compile(function, backend=backend, fullgraph=True), backend


def wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_near(got: Any, usual: Any, true: Any) -> None:
    """All tensors of a result."""
    for mine, theirs, exact in zip(*map(tree_leaves, (got, usual, true)), strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        error, allowed = ((t.double() - exact).norm() for t in (mine, theirs))
        assert error <= 2 * allowed + 1e-6 * exact.norm()
