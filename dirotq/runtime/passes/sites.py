"""Linears that read one input: one transform, one wide product (docs/method.md M1).

A network calls them one by one (q, k and v; gate and up), each for its rows of the site's wide
linear. The calls become one, and each reader takes its columns of what it returns.
"""

import operator
from collections import defaultdict

from torch.fx import GraphModule, Node

from .graph import ROWS, between, call, is_untouched, writes


def rewrite(module: GraphModule) -> int:
    """Join calls of the same packed tensors with the same input; return how many are gone."""
    groups: dict[tuple[object, ...], list[Node]] = defaultdict(list)
    for node in module.graph.nodes:
        if is_untouched(node):
            groups[(*node.args[:ROWS], *sorted(node.kwargs.items()))].append(node)
    gone = 0
    for nodes in groups.values():
        for run in _neighbours(nodes):
            if not any(writes(node) for node in between(run[0], run[-1])):
                _join(module, run)
                gone += len(run) - 1
    return gone


def _rows(node: Node) -> tuple[int, int]:
    """Return the first output of a call and the one after its last."""
    rows = node.args[ROWS] if len(node.args) > ROWS else None
    if rows is None:
        return 0, node.meta["example_value"].shape[-1]
    first, last = rows  # type: ignore[misc]
    return int(first), int(last)  # type: ignore[arg-type]


def _neighbours(nodes: list[Node]) -> list[list[Node]]:
    """Divide calls, in the graph's order, into those whose outputs lie side by side: several each,
    each output once."""
    runs: list[list[Node]] = []
    end = None
    for node in sorted(nodes, key=_rows):
        first, last = _rows(node)
        if first == end:
            runs[-1].append(node)
        else:
            runs.append([node])
        end = last
    order = {node: i for i, node in enumerate(nodes)}
    return [sorted(run, key=order.__getitem__) for run in runs if len(run) > 1]


def _join(module: GraphModule, run: list[Node]) -> None:
    rows = [_rows(node) for node in run]
    start, end = min(first for first, _ in rows), max(last for _, last in rows)
    with module.graph.inserting_before(run[0]):
        read = (*run[0].args[:ROWS], [start, end])
        wide = call(module, run[0].target, *read, **run[0].kwargs)
        parts = [
            call(module, operator.getitem, wide, (..., slice(first - start, last - start)))
            for first, last in rows
        ]
    for node, part in zip(run, parts, strict=True):
        node.replace_all_uses_with(part)
        module.graph.erase_node(node)
