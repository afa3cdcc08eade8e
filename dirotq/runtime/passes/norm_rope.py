"""RMSNorm and rotary embedding of queries and keys as one operator, ``dirotq::norm_rope``.

Families write them in a dozen ways: real or complex, pairs of neighbours or of halves, a norm in
one function or in six. So the pass does not look for these. It runs what follows from a tensor on
two rows (:mod:`.by_row`), and compares with the operator's specification: what agrees is replaced.
Text and image that are normed apart and then joined become one call with several parts.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dirotq.kernels.norm_rope import reference, why_not

from . import by_row
from .graph import between, call, writes

OPERATOR = torch.ops.dirotq.norm_rope.default
HEAD = 256
"""Channels of the widest head that is worth a norm without rotation: wider norms are not those of
heads, and Inductor fuses them with what is around."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Nodes that compute what the operator does.

    heads  H and D of the result, as the operator sees it
    swap   whether heads come before tokens
    """

    x: Node
    out: Node
    steps: list[Node]
    heads: tuple[int, int]
    swap: bool
    eps: float | None
    weight: Node | None
    tables: tuple[Node, ...]
    """None; one of complex numbers; or cos and sin."""
    interleaved: bool


def rewrite(module: GraphModule, *, anywhere: bool = False) -> int:
    """Put the operator in place of norms and rotations; return how many calls of it there are.

    ``anywhere``: on devices and dtypes without a kernel too, where plain torch runs it.
    """
    gone: set[Node] = set()
    for node in list(module.graph.nodes):
        if node in gone:
            continue
        x = _join(module, node, gone) or node
        while (found := _find(x, anywhere)) is not None:
            x = _replace(module, found, gone)
    return len(module.graph.find_nodes(op="call_function", target=OPERATOR))


def _find(x: Node, anywhere: bool) -> Found | None:
    """Return the longest chain from x that the operator computes, if its kernel takes x."""
    example = x.meta.get("example_value")
    if not isinstance(example, Tensor) or not example.is_floating_point():
        return None
    if example.ndim not in (3, 4) or not isinstance(example.shape[-1], int):
        return None
    if torch.is_grad_enabled() and example.requires_grad:
        return None
    if not anywhere and why_not(example.dtype, example.device, 8) is not None:
        return None
    rows = by_row.follow(x, example.ndim - 1)
    for out in reversed(list(rows.values)):
        if out is x or (heads := _heads(x, out)) is None:
            continue
        steps = by_row.steps(rows, out)
        if steps is None or any(writes(n) and n not in steps for n in between(x.next, out)):
            continue
        if not anywhere and why_not(example.dtype, example.device, heads[1]) is not None:
            continue
        if (found := _compare(rows, out, steps, heads)) is not None:
            return found
    return None


def _heads(x: Node, out: Node) -> tuple[int, int] | None:
    """Return H and D of a result that the operator could have for x. For x [B, T, C] they are
    those of the result [B, T, H, D], or 1 and C."""
    a, b = x.meta["example_value"], out.meta.get("example_value")
    if not isinstance(b, Tensor) or b.dtype != a.dtype or b.shape[-1] % 2:
        return None
    if a.ndim == 3 and b.ndim == 4:
        return (b.shape[2], b.shape[3]) if a.shape[2] == b.shape[2] * b.shape[3] else None
    if not by_row.same(a.shape, b.shape):
        return None
    return (1, a.shape[2]) if a.ndim == 3 else (1, a.shape[3])


def _compare(
    rows: by_row.Rows, out: Node, steps: list[Node], heads: tuple[int, int]
) -> Found | None:
    """Return what the steps compute, if it is what the operator would."""
    leaves = {n: rows.leaves[n] for s in steps for n in s.all_input_nodes if n in rows.leaves}
    weights = [n for n in leaves if n.meta["example_value"].ndim == 1]
    tables = [n for n in leaves if n not in weights]
    if len(weights) > 1 or len(tables) > 2:
        return None
    weight = weights[0] if weights else None
    swap = _heads_first(rows.x, tables)
    if swap is None or (swap and any(user.target == "view" for user in out.users)):
        return None  # the operator's rows lie token after token
    x, want = (rows.values[n].reshape(len(by_row.SCALES), 1, *heads) for n in (rows.x, out))
    for eps, order, interleaved in itertools.product(
        _epsilons(steps) if weight is not None else [None, *_epsilons(steps)],
        itertools.permutations(tables), (True, False),
    ):  # fmt: skip
        if eps is None and not tables:
            continue
        cos, sin = _small_tables([leaves[n] for n in order], heads[1])
        if cos is None and tables:
            continue
        try:
            one = None if weight is None else leaves[weight].flatten()
            got = reference.norm_rope([x], [one], eps, [cos], [sin], interleaved)
        except ValueError:
            continue
        if torch.allclose(got, want, rtol=1e-9, atol=1e-12):
            found = Found(
                x=rows.x, out=out, steps=steps, heads=heads, swap=swap, eps=eps, weight=weight,
                tables=order, interleaved=interleaved,
            )  # fmt: skip
            return found if _worth(found) else None
    return None


def _worth(found: Found) -> bool:
    """Tell whether the operator is faster than what Inductor makes of it."""
    if found.tables:
        return True
    wide = found.weight is not None and _example(found.weight).numel() > found.heads[1]
    return _example(found.out).ndim == 4 and found.heads[1] <= HEAD and not wide


def _epsilons(steps: list[Node]) -> list[float]:
    """List the small numbers that the steps are given."""
    flat = (a for s in steps for a in (*s.args, *s.kwargs.values()))
    return sorted({a for a in flat if isinstance(a, float) and 0 < a < 0.1})


def _small_tables(tables: list[Tensor], dim: int) -> tuple[Tensor | None, Tensor | None]:
    """Return cos and sin of a row, [1, 1, 1, D or D / 2] each; None if they can't be that."""
    if not tables:
        return None, None
    if len(tables) == 1:
        tables = [tables[0].real, tables[0].imag] if tables[0].is_complex() else []
    if not tables or any(t.is_complex() or t.numel() != t.shape[-1] for t in tables):
        return None, None
    cos, sin = (t.reshape(1, 1, 1, -1) for t in tables)
    return cos, sin


def _heads_first(x: Node, tables: list[Node]) -> bool | None:
    """Tell whether x is [B, H, T, D]: by the axis along which tables differ, and by where numbers
    lie without tables; None if tables differ from head to head too."""
    example = _example(x)
    if example.ndim == 3:
        return False
    shapes = [(1,) * (4 - _example(t).ndim) + tuple(_example(t).shape) for t in tables]
    second, third = (any(not by_row.alike(s[axis], 1) for s in shapes) for axis in (1, 2))
    if second and third:
        return None
    if second or third:
        return third
    return bool(statically_known_true(example.stride(1) < example.stride(2)))


def _example(node: Node) -> Any:
    return node.meta["example_value"]


def _replace(module: GraphModule, found: Found, gone: set[Node]) -> Node:
    """Put the operator in place of what was found; return the node of the result."""
    with module.graph.inserting_before(found.out):
        add = functools.partial(call, module)
        x, count = found.x, _example(found.x).ndim
        if count == 3:
            x = add(torch.unflatten, x, -1, found.heads)
        elif found.swap:
            x = add(torch.transpose, x, 1, 2)
        cos, sin = ([t] for t in _tables(module, found))
        arguments = [x], [found.weight], found.eps, cos, sin, found.interleaved
        if (before := _rotated_later(found)) is not None:
            arguments = (*before.args[:3], cos, sin, found.interleaved)  # type: ignore[assignment]
        new = add(OPERATOR, *arguments)
        if found.swap:
            new = add(torch.transpose, new, 1, 2)
        if _example(found.out).ndim == 3:
            new = add(torch.flatten, new, 2)
    found.out.replace_all_uses_with(new)
    for node in reversed(found.steps):
        module.graph.erase_node(node)
        gone.add(node)
    _erase_unread(module, x, gone)
    return new


def _tables(module: GraphModule, found: Found) -> Iterator[Node | None]:
    """Yield cos and sin as the operator reads them, [B or 1, T or 1, 1, D or D / 2]."""
    if not found.tables:
        yield from (None, None)
        return
    tables: tuple[Node, ...] = found.tables
    if len(tables) == 1:
        pairs = call(module, torch.view_as_real, tables[0])
        tables = tuple(call(module, torch.select, pairs, -1, i) for i in (0, 1))
    for table in tables:
        if _example(found.out).ndim == 3:
            table = call(module, torch.unsqueeze, table, -2)
        for _ in range(4 - _example(table).ndim):
            table = call(module, torch.unsqueeze, table, 0)
        yield call(module, torch.transpose, table, 1, 2) if found.swap else table


def _rotated_later(found: Found) -> Node | None:
    """Return the operator that has only normed what is rotated here, and for nobody else."""
    before = _operator_behind(found.x, found.swap)
    if before is None or found.eps is not None or set(found.x.users) - set(found.steps):
        return None
    arguments: Any = before.args
    if any(table is not None for table in arguments[3]) or _written(before, found.out):
        return None
    return before


def _written(first: Node, last: Node) -> bool:
    """Tell whether anything may change in between, so that the first can't run with the last."""
    return any(writes(node) for node in between(first, last))


def _operator_behind(node: Node, swap: bool) -> Node | None:
    """Return the operator whose result a node is, or with ``swap`` its transposed result."""
    if swap:
        if node.target is not torch.transpose or node.args[1:] != (1, 2):
            return None
        node = node.args[0]  # type: ignore[assignment]
        if len(node.users) > 1:
            return None
    return node if node.target is OPERATOR else None


def _join(module: GraphModule, node: Node, gone: set[Node]) -> Node | None:
    """Make one operator of several whose tokens are concatenated; return its result's node."""
    if node.target not in (torch.cat, torch.concat) or _example(node).ndim != 4:
        return None
    values = dict(zip(("tensors", "dim"), node.args)) | node.kwargs
    tensors: Any = values["tensors"]
    axis: Any = values.get("dim", 0)
    swap = axis % 4 == 2
    parts = [p for t in tensors if len(t.users) == 1 and (p := _operator_behind(t, swap))]
    if axis % 4 not in (1, 2) or len(parts) < len(tensors):
        return None
    if any(_written(part, node) for part in parts):
        return None
    found: list[Any] = [part.args for part in parts]
    turning = {args[5] for args in found if any(table is not None for table in args[3])}
    if len({args[2] for args in found}) > 1 or len(turning) > 1:
        return None
    if any(len(args[3]) != len(args[0]) for args in found):
        return None
    lists = ([one for args in found for one in args[i]] for i in (0, 1, 3, 4))
    xs, weights, cos, sin = lists
    with module.graph.inserting_before(node):
        turned = turning.pop() if turning else True
        new = call(module, OPERATOR, xs, weights, found[0][2], cos, sin, turned)
        if swap:
            new = call(module, torch.transpose, new, 1, 2)
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)
    gone.add(node)
    for tensor in tensors:
        _erase_unread(module, tensor, gone)
    return new


def _erase_unread(module: GraphModule, node: Node, gone: set[Node]) -> None:
    """Erase views and operators of ours that nobody reads any more."""
    ours = (OPERATOR, torch.transpose, torch.unflatten, torch.unsqueeze, torch.select)
    if node in gone or node.users or node.target not in ours:
        return
    read = node.all_input_nodes
    module.graph.erase_node(node)
    gone.add(node)
    for one in read:
        _erase_unread(module, one, gone)
