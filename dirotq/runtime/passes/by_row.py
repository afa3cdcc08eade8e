"""What a graph does to every row of a tensor alike, found by running it on two rows.

Norms and rotary embeddings mix the channels of a row and nothing else. Whatever functions a network
writes them with, two rows of random numbers in float64 say what is computed: shapes baked into the
graph, dtypes and the size of the model do not matter.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

SCALES = (1.0, 1e-3)
"""Of the two rows: in the second one, the epsilon of a norm shows."""

SYMBOL = object()
"""Stands for a size that the graph computes: views are known without it, nothing else takes it."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What follows from ``x``: nodes of its leading axes, in the graph's order.

    leading  how many axes count rows; the others, and what views make of them, are a row
    values   of each node for two rows; tuples where it returns several; () of an assignment
    leaves   what else is read, with random numbers: a row's, whatever the row
    """

    x: Node
    leading: int
    values: dict[Node, Any] = field(default_factory=dict)
    leaves: dict[Node, Tensor] = field(default_factory=dict)


class Unknown(Exception):
    """A node does something else than to treat rows alike."""


def follow(x: Node, leading: int, seed: int = 0) -> Rows:
    """Run all that follows from x, as far as it treats rows alike."""
    generator = torch.Generator().manual_seed(seed)
    found = Rows(x, leading)
    tail = x.meta["example_value"].shape[leading:]
    scales = torch.tensor(SCALES, dtype=torch.float64).view(-1, *[1] * (leading - 1 + len(tail)))
    ones = [1] * (leading - 1)
    found.values[x] = scales * _random((len(SCALES), *ones, *tail), generator)
    waiting, node = set(x.users), x.next
    while waiting and node.op != "output":
        if node in waiting:
            waiting.discard(node)
            try:
                found.values[node] = _run(found, node, generator)
                waiting.update(node.users)
            except Unknown:
                pass
        node = node.next
    return found


def steps(found: Rows, out: Node) -> list[Node] | None:
    """Return the nodes from x to ``out``; None if anybody else reads one of them."""
    needed: set[Node] = set()
    open_ends = [out]
    while open_ends:
        node = open_ends.pop()
        if node not in needed and node is not found.x:
            needed.add(node)
            open_ends += [n for n in node.all_input_nodes if n in found.values]
            open_ends += _assignments(node)
    inner = needed - {out}
    if any(not needed.issuperset(node.users) for node in inner) or not needed <= set(found.values):
        return None
    if _assignments(out):
        return None  # filled in later than where it stands
    return [node for node in found.values if node in needed]


def _assignments(node: Node) -> list[Node]:
    return [n for n in node.users if n.target is operator.setitem and n.args[0] is node]


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Tell whether two shapes are known to be the same, without a guard on symbols."""
    return len(a) == len(b) and all(map(alike, a, b))


def alike(m: Any, n: Any) -> bool:
    """Tell whether two sizes are known to be the same."""
    return m is n or bool(m == n if type(m) is type(n) is int else statically_known_true(m == n))


def _random(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _run(found: Rows, node: Node, generator: torch.Generator) -> Any:
    """Return a node's value for two rows. Raises Unknown."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    rule = RULES.get(name)
    if node.op not in ("call_function", "call_method") or rule is None:
        raise Unknown
    example = node.meta.get("example_value")
    shown = example if isinstance(example, (tuple, list)) else [example]
    if rule is not _assign and not all(_of_rows(one, found) for one in shown):
        raise Unknown

    def value(n: Node) -> Any:
        if n in found.values:
            return found.values[n]
        if isinstance(n.meta.get("example_value"), (int, torch.SymInt)):
            return SYMBOL
        if n not in found.leaves:
            found.leaves[n] = _leaf(n, example, found.leading, generator)
        return found.leaves[n]

    args, kwargs = torch.fx.map_arg((tuple(node.args), dict(node.kwargs)), value)
    try:
        result = rule(found, node, *args, **kwargs)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:  # arguments we don't know
        raise Unknown from error
    tails = [one.shape[found.leading :] for one in shown if isinstance(one, Tensor)]
    values = result if isinstance(result, tuple) else (result,)
    if [tuple(v.shape[found.leading :]) for v in values] != [tuple(t) for t in tails]:
        raise Unknown
    return result


def _of_rows(example: Any, found: Rows) -> bool:
    """Tell whether it has the rows of x: its device and leading axes, and a row of known size."""
    x = found.x.meta["example_value"]
    return (
        isinstance(example, Tensor)
        and example.device == x.device
        and (example.is_floating_point() or example.is_complex())
        and example.dtype.itemsize > 1  # a cast to 8 bits is more than rounding
        and same(example.shape[: found.leading], x.shape[: found.leading])
        and all(isinstance(n, int) for n in example.shape[found.leading :])
    )


def _leaf(node: Node, result: Any, leading: int, generator: torch.Generator) -> Tensor:
    """Return what a row reads of a tensor that is broadcast to the result's shape."""
    example = node.meta.get("example_value")
    if not isinstance(example, Tensor) or not isinstance(result, Tensor):
        raise Unknown
    if not (example.is_floating_point() or example.is_complex()) or example.ndim > result.ndim:
        raise Unknown
    tail = example.shape[-(result.ndim - leading) :] if result.ndim > leading else ()
    if not all(isinstance(n, int) for n in tail):
        raise Unknown
    shape = [1] * (result.ndim - len(tail)) + list(tail)
    numbers = _random(shape, generator)
    return torch.complex(numbers, _random(shape, generator)) if example.is_complex() else numbers


def _viewed(found: Rows, node: Node, x: Any, *args: Any, **_: Any) -> Any:
    _first(found, node)
    if any(isinstance(arg, torch.dtype) for arg in args):
        raise Unknown  # the bits of another dtype
    return x.reshape(*x.shape[: found.leading], *node.meta["example_value"].shape[found.leading :])


def _alone(compute: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Of one tensor; dtypes and memory formats change nothing."""

    def run(found: Rows, node: Node, x: Any, *_: Any, **__: Any) -> Any:
        _first(found, node)
        return compute(x)

    return run


def _elementwise(compute: Callable[..., Tensor]) -> Callable[..., Any]:
    def run(found: Rows, node: Node, *args: Any) -> Any:
        axes = node.meta["example_value"].ndim
        for arg in node.args:
            if isinstance(arg, Node) and arg in found.values and found.values[arg].ndim != axes:
                raise Unknown  # broadcasting would make other rows of it
        return compute(*args)

    return run


def _reduced(compute: Callable[..., Tensor]) -> Callable[..., Any]:
    def run(found: Rows, node: Node, x: Any, dim: Any, keepdim: bool = False) -> Any:
        _first(found, node)
        dims = [dim] if isinstance(dim, int) else dim
        for one in dims:
            _in_a_row(found, one, x.ndim)
        return compute(x, dims, keepdim=keepdim)

    return run


def _rms_norm(
    found: Rows, node: Node, input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None
) -> Any:
    if eps is None or input.ndim - len(normalized_shape) < found.leading:
        raise Unknown
    tail = tuple(normalized_shape)
    weight = None if weight is None else weight.reshape(tail)
    return torch.nn.functional.rms_norm(input, tail, weight, eps)


def _divided(compute: Callable[..., Any], first: int) -> Callable[..., Any]:
    """``first``: how many arguments stand before the axis."""

    def run(found: Rows, node: Node, x: Any, *args: Any, dim: int = 0) -> Any:
        _first(found, node)
        sizes, axis = args[:first], args[first] if len(args) > first else dim
        _in_a_row(found, axis, x.ndim)
        return tuple(compute(x, *sizes, axis))

    return run


def _joined(compute: Callable[..., Tensor], more: int) -> Callable[..., Any]:
    """``more``: axes that the result has and the tensors don't."""

    def run(found: Rows, node: Node, tensors: Any, dim: int = 0) -> Any:
        if not all(n in found.values for n in node.all_input_nodes):
            raise Unknown
        _in_a_row(found, dim, tensors[0].ndim + more)
        return compute(tensors, dim)

    return run


def _item(found: Rows, node: Node, x: Any, index: Any) -> Any:
    _first(found, node)
    if isinstance(x, tuple):
        return x[index]
    _index_of_a_row(found, index, x.ndim)
    return x[index]


def _assign(found: Rows, node: Node, x: Any, index: Any, value: Any) -> tuple[()]:
    """Fill in what has been made empty and has not been read."""
    target = _first(found, node)
    name = getattr(target.target, "__name__", "")
    read = [n for n in target.users if n in found.values and n.target is not operator.setitem]
    if name not in ("empty_like", "zeros_like") or read:
        raise Unknown
    _index_of_a_row(found, index, x.ndim)
    x[index] = value
    return ()


def _first(found: Rows, node: Node) -> Node:
    """Return the first argument, if it is one of the rows."""
    first = node.args[0] if node.args else None
    if not isinstance(first, Node) or first not in found.values:
        raise Unknown
    return first


def _in_a_row(found: Rows, axis: int, axes: int) -> None:
    if not isinstance(axis, int) or axis % axes < found.leading:
        raise Unknown


def _index_of_a_row(found: Rows, index: Any, axes: int) -> None:
    index = index if isinstance(index, tuple) else (index,)
    whole = index[: found.leading] == (slice(None),) * found.leading
    last = index[0] is Ellipsis and sum(i is not None for i in index[1:]) <= axes - found.leading
    if any(isinstance(i, Tensor) for i in index) or not (whole or last):
        raise Unknown


RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        ("to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone"),
        _alone(torch.clone),
    ),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"), _viewed),
    **{
        name: _elementwise(getattr(torch, name))
        for name in ("mul", "add", "sub", "neg", "div", "pow", "rsqrt", "sqrt", "square")
    },
    "truediv": _elementwise(torch.div),
    "mean": _reduced(torch.mean),
    "sum": _reduced(torch.sum),
    "rms_norm": _rms_norm,
    "chunk": _divided(torch.chunk, 1),
    "split": _divided(torch.split, 1),
    "unbind": _divided(torch.unbind, 0),
    "stack": _joined(torch.stack, 1),
    "cat": _joined(torch.cat, 0),
    "view_as_complex": _alone(torch.view_as_complex),
    "view_as_real": _alone(torch.view_as_real),
    "empty_like": _alone(torch.zeros_like),
    "zeros_like": _alone(torch.zeros_like),
    "getitem": _item,
    "setitem": _assign,
}
"""By name: torch's functions and methods, and Python's operators."""
