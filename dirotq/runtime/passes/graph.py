"""Small questions to a graph, and small changes of it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

LINEAR = "dirotq.quant_linear.default"
X, SPEC, ROWS = 0, 8, 11
"""Positions of some of its arguments (kernels/ops.py)."""

UPDATES = frozenset({"down", "up"})
"""Arguments of a packed linear that an adapter updates."""

WRITERS = frozenset({
    "setitem", "delitem", "iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod",
    "imul", "ior", "ipow", "irshift", "isub", "itruediv", "ixor",
})  # fmt: skip
"""Functions of ``operator`` that change their first argument."""


def is_linear(node: Node) -> bool:
    """Tell whether it is a packed linear."""
    return node.op == "call_function" and str(node.target) == LINEAR


def is_untouched(node: Node) -> bool:
    """Tell whether it is a packed linear of which no pass has taken anything in yet."""
    return is_linear(node) and len(node.args) <= ROWS + 1 and node.kwargs.keys() <= UPDATES


def call(module: GraphModule, target: Any, *args: Any, **kwargs: Any) -> Node:
    """Insert a call of a function, with what it returns for the example's tensors."""
    node = module.graph.call_function(target, args, kwargs)
    examples = torch.fx.map_arg((args, kwargs), lambda n: n.meta.get("example_value"))
    with torch.no_grad():
        node.meta["example_value"] = target(*examples[0], **examples[1])
    return node


def writes(node: Node) -> bool:
    """Tell whether a node may change a tensor in place."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable
    name = getattr(node.target, "__name__", str(node.target))
    in_place = name.endswith("_") and not name.endswith("__")
    asked = "out" in node.kwargs or node.kwargs.get("inplace") is True
    return in_place or asked or name in WRITERS


def between(first: Node, last: Node) -> Iterable[Node]:
    """Yield the nodes from ``first`` to before ``last``."""
    node = first
    while node is not last:
        yield node
        node = node.next


def drop_inert(module: GraphModule) -> int:
    """Take out dropouts that drop nothing: they stand between what the other passes look for."""
    found = 0
    for node in module.graph.find_nodes(
        op="call_function", target=torch.nn.functional.dropout, sort=False
    ):
        values = dict(zip(("input", "p", "training", "inplace"), node.args)) | node.kwargs
        if not values.get("training", True) or values.get("p", 0.5) == 0:
            node.replace_all_uses_with(values["input"])
            module.graph.erase_node(node)
            found += 1
    return found
