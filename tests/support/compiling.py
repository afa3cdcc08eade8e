"""Compiled blocks on a CPU: dynamo and our passes as on a GPU, then torch's own interpreter."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.fx import GraphModule

from dirotq.kernels.attention import redirect
from dirotq.runtime import compiled, passes


class Seen(Counter[str]):
    """How often each pass changed something; ``graphs``, as they were left."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs: list[GraphModule] = []


@contextmanager
def compiling(after: Any = None) -> Iterator[Seen]:
    """Let CPUs compile; ``after`` is a backend to go on with, None: the graph as it is."""
    seen = Seen()

    def backend(module: GraphModule, example_inputs: Sequence[Any]) -> Any:
        for rewrite in passes.PASSES:
            name = f"{rewrite.__module__.rpartition('.')[2]}.{rewrite.__name__}"
            # Its kernel is not here; plain torch computes the same.
            more = {"anywhere": True} if rewrite is passes.norm_rope.rewrite else {}
            seen[name] += rewrite(module, **more)
        seen["attention"] += redirect.replace(module.graph, "exact")
        module.graph.lint()
        module.recompile()
        seen.graphs.append(module)
        return after(module, example_inputs) if after else module

    torch._dynamo.reset()
    with (
        patch.object(compiled, "has_kernels", lambda device: True),
        patch.object(compiled.Compiler, "backend", staticmethod(backend)),
    ):
        yield seen


def linears(module: GraphModule) -> list[torch.fx.Node]:
    """List the packed linears of a graph."""
    return [node for node in module.graph.nodes if passes.graph.is_linear(node)]
