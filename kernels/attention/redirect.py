"""Torch's attention, sent to ours: in eager code by a mode, in a compiler's graph by a pass.

Diffusers' default backend calls ``F.scaled_dot_product_attention``, its others call something else
or restrict torch's backends around the call (``_native_*``): both are left as they are.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from . import ops  # noqa: F401 - defines the operator
from .engines import Mode, unrestricted

__all__ = ["Redirect", "ours", "plain", "replace"]

OPERATOR = torch.ops.dirotq.attention.default
BACKENDS = 4
"""Of torch on GPUs: cuDNN, flash, memory-efficient, plain. With fewer, somebody has chosen."""


class Redirect(TorchFunctionMode):
    """``with Redirect("fp8"):`` plain calls of ``F.scaled_dot_product_attention`` go to ours.

    For eager code; in what is compiled, :func:`replace` does it.
    """

    def __init__(self, mode: Mode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and plain(*args, **kwargs) and unrestricted():
            return ours(*args, **kwargs, mode=self.mode)
        return func(*args, **kwargs)


def replace(graph: torch.fx.Graph, mode: Mode) -> int:
    """Make plain calls of ``F.scaled_dot_product_attention`` in a graph of torch's functions, as
    dynamo hands one to its backend, calls of ``dirotq::attention``; return how many were.

    Calls inside of ``sdpa_kernel`` stay.
    """
    replaced, free = 0, unrestricted()
    for node in graph.nodes:
        if node.target is torch_attention._sdpa_kernel:
            free = len(node.args[0]) >= BACKENDS
        elif node.target is scaled_dot_product_attention and free:
            values = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
            if plain(*values[0], **values[1]):
                node.target = OPERATOR
                node.args = (*_operands(*node.args, **node.kwargs), mode)
                node.kwargs = {}
                replaced += 1
    return replaced


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Tell whether a call of ``F.scaled_dot_product_attention`` is one that ours can replace:
    everything attends to everything, every query head has keys of its own, nobody wants gradients.

    Takes that function's own arguments; tensors may be fake.
    """
    if attn_mask is not None or dropout_p or is_causal:
        return False
    qkv = query, key, value
    q, k = query.shape, key.shape
    if len(q) != 4 or k != value.shape or (*q[:2], q[3]) != (*k[:2], k[3]):
        return False
    kind = query.device.type
    if kind not in ("cpu", "cuda") or not query.is_floating_point():
        return False
    if torch.is_autocast_enabled(kind):
        return False
    if any(t.dtype != query.dtype or t.device != query.device for t in qkv):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in qkv))


def ours(*args: Any, mode: Mode, **kwargs: Any) -> Tensor:
    """Compute a :func:`plain` call of ``F.scaled_dot_product_attention``, [B, H, T, d]."""
    return OPERATOR(*_operands(*args, **kwargs), mode)


def _operands(query: Any, key: Any, value: Any, *_: Any, scale: Any = None, **__: Any) -> Any:
    """Return the operator's arguments, but for the mode, of a :func:`plain` call's."""
    return query, key, value, None, scale
