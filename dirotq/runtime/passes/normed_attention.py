"""Queries and keys that are normed for attention in FP8 alone, written in FP8 by who norms them."""

from typing import Any

from torch.fx import GraphModule, Node

from dirotq.kernels.attention import flash3
from dirotq.kernels.attention.normed import OPERATOR
from dirotq.kernels.attention.redirect import OPERATOR as ATTENTION
from dirotq.kernels.chip import capability
from dirotq.kernels.norm_rope import why_not_codes

from .graph import between, writes
from .norm_rope import OPERATOR as NORM_ROPE


def rewrite(module: GraphModule, *, anywhere: bool = False) -> int:
    """Join attention in mode ``fp8`` and what norms its queries and keys; return how often.

    ``anywhere``: also where FlashAttention-3 does not run in FP8.
    """
    found = 0
    for node in module.graph.find_nodes(op="call_function", target=ATTENTION, sort=False):
        q, k = _normed(node.args[0]), _normed(node.args[1])
        if q is None or k is None or not _joinable(node, q, k):
            continue
        if not anywhere and _why_not(node) is not None:
            continue
        views: list[Any] = list(node.args[:2])
        _, _, value, _, scale, _ = node.args
        node.target = OPERATOR
        node.args = (*q.args[:5], *k.args[:5], q.args[5], value, scale)
        for view, normed in zip(views, (q, k), strict=True):
            module.graph.erase_node(view)
            for user in list(normed.users):
                user.replace_input_with(normed, normed.args[0][0])  # type: ignore[index,arg-type]
            module.graph.erase_node(normed)
        found += 1
    return found


def _why_not(node: Node) -> str | None:
    """Return why FlashAttention-3 does not take such heads in FP8 here."""
    value: Any = node.args[2]
    example = value.meta["example_value"]
    chip = capability(example.device)
    return flash3.why_not(chip, example.shape[-1], example.dtype, fp8=True)


def _joinable(node: Node, q: Node, k: Node) -> bool:
    head = node.args[2].meta["example_value"].shape[-1]  # type: ignore[union-attr]
    if node.args[3] is not None or node.args[5] != "fp8" or q.args[5] != k.args[5]:
        return False
    for one in (q, k):
        arguments: Any = one.args
        weights = [None if w is None else w.meta["example_value"] for w in arguments[1]]
        if why_not_codes(weights, arguments[2], head) is not None:
            return False
        if any(writes(other) for other in between(one, node)):
            return False
    return True


def _normed(view: Any) -> Node | None:
    """Return the ``norm_rope`` that has a transposed result of which nobody else reads numbers."""
    if not _swaps_heads_and_tokens(view) or len(view.users) > 1:
        return None
    node = view.args[0]
    others = [user for user in node.users if user is not view]
    alone = all(user.target == "type_as" and user.args[0] is not node for user in others)
    return node if node.target is NORM_ROPE and alone else None


def _swaps_heads_and_tokens(node: Node) -> bool:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    rest = node.args[1:]
    axes = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
    if not all(isinstance(axis, int) for axis in axes) or node.kwargs:
        return False
    axes = [axis % 4 for axis in axes]  # type: ignore[operator]
    if name in ("transpose", "swapaxes", "swapdims"):
        return sorted(axes) == [1, 2]
    return name == "permute" and axes == [0, 2, 1, 3]
