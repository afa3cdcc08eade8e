"""What we change in a block's graph before Inductor compiles it: one pass serves every family.

A pass takes the graph as dynamo traced it (torch's own functions, parameters as placeholders),
changes it in place and returns how many places it changed. It recognizes what stands next to
``dirotq::quant_linear``, by what is computed and not by whose class computes it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from . import prologues, sites
from .graph import drop_inert

Pass = Callable[[GraphModule], int]

PASSES: tuple[Pass, ...] = (drop_inert, sites.rewrite, prologues.rewrite)


def rewritten(module: GraphModule) -> GraphModule:
    """Apply all passes to a graph, in place, and return it."""
    for rewrite in PASSES:
        rewrite(module)
    module.graph.lint()
    module.recompile()
    return module


def backend(module: GraphModule, example_inputs: Sequence[Any]) -> Any:
    """Compile as ``torch.compile`` does by default, after our passes."""
    return torch._inductor.compile(rewritten(module), list(example_inputs))
