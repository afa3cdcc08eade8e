"""GELU, and a concatenation with it, inside of the packed linear that reads it.

Its kernels read the activation twice; computing GELU on the way in saves writing it and reading it
once more (kernels/prologue.py).
"""

import json
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .graph import LINEAR, SPEC, X, is_untouched

gelu = torch._C._nn.gelu


def rewrite(module: GraphModule) -> int:
    """Move GELU (tanh) into the linears that read nothing else of it; return into how many."""
    found = 0
    for node in list(module.graph.nodes):
        if not (is_untouched(node) and _quantizes(node)):
            continue
        read: Any = node.args[X]
        if _is_gelu(read) and _only_linears(read):
            kwargs: dict[str, Any] = {"prologue": "gelu"}
            first = _input(read)
        elif (joined := _concatenated(read)) is not None and _only_linears(read):
            first, behind = joined
            kwargs = {"prologue": "concat", "behind": behind}
        else:
            continue
        node.args = (first, *node.args[1:])
        node.kwargs = {**node.kwargs, **kwargs}
        _erase_unread(module, read)
        found += 1
    return found


def _quantizes(node: Node) -> bool:
    """Tell whether it rounds its input: what keeps 16 bits reads it once and gains nothing."""
    key: Any = node.args[SPEC]
    return json.loads(key)["act_bits"] != 16


def _is_gelu(node: Any) -> bool:
    return (
        isinstance(node, Node)
        and node.target is gelu
        and (node.kwargs.get("approximate") == "tanh" or node.args[1:] == ("tanh",))
    )


def _input(node: Node) -> Any:
    return node.args[0] if node.args else node.kwargs["input"]


def _concatenated(node: Any) -> tuple[Any, Any] | None:
    """Return x and y of cat([x, gelu(y)]) along the channels, if nobody else reads gelu(y)."""
    if not (isinstance(node, Node) and node.target is torch.cat):
        return None
    values = dict(zip(("tensors", "dim"), node.args)) | node.kwargs
    parts: Any = values["tensors"]
    dim = values.get("dim", 0)
    if len(parts) != 2 or dim not in (-1, node.meta["example_value"].ndim - 1):
        return None
    first, second = parts
    if not _is_gelu(second) or len(second.users) > 1:
        return None
    return first, _input(second)


def _erase_unread(module: GraphModule, node: Node) -> None:
    """Erase GELU, or a concatenation and its GELU, once no linear reads it."""
    for unread in (node, *node.all_input_nodes):
        if not unread.users and unread.target in (gelu, torch.cat):
            module.graph.erase_node(unread)


def _only_linears(node: Node) -> bool:
    return all(str(user.target) == LINEAR and _quantizes(user) for user in node.users)
