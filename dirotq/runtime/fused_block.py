"""What the fused blocks of all families share: how they are installed, when a block may run fused,
and the parts that several families have.

A block runs fused while it is as diffusers made it. Anything else (another attention processor,
hooks on any module inside or another one in its place, gradients, autocast, ``torch.compile``)
falls back to the forward that the block had before.

Letters: B images, T tokens, S text tokens, D channels, C chunks of a modulation.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn

from dirotq.kernels.prologue import Prologue, gelu

from .accelerate import Modulators, Runtime, Shared, read
from .as_made import Made
from .graph_watch import RUNTIME


def install(
    transformer: Any,
    fused: Iterable[tuple[Sequence[Any], Callable[..., Any]]],
    modulators: Modulators | None = None,
) -> None:
    """Give blocks their fused forward, in place; a repeated installation takes in new sites.

    fused       blocks of one class, and the forward that is bound to each of them. It finds what
                it falls back to under ``_dirotq_unfused`` and the rest under ``_dirotq_shared``
    modulators  of all these blocks, where each has its own
    """
    runtime = getattr(transformer, RUNTIME, None) or Runtime()
    shared = Shared(runtime=runtime, modulators=modulators)
    transformer._dirotq_shared = shared
    for blocks, forward in fused:
        for block in blocks:
            state = vars(block)
            # The class's, or a function bound by hand, if sharing gave it one; never a fused one.
            before = getattr(state.get("forward"), "func", type(block).forward)
            if before is not forward:
                block._dirotq_unfused = before
            block._dirotq_shared = shared
            block._dirotq_made = Made.now(block)
            # The forward of this object and not a subclass: diffusers finds blocks by their class.
            # A method bound by hand would not pickle: it is looked up by its name in the class.
            block.forward = functools.partial(forward, block)


def may_fuse(block: Any, x: Tensor) -> bool:
    """Tell whether the block may run as one just now: every module inside is as it was made, and
    nobody waits for a call of it."""
    return (
        not torch.compiler.is_compiling()
        and block._dirotq_shared.runtime.fused
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and block._dirotq_made.inside()
    )


def plain_norm(norm: Any) -> bool:
    """Tell whether it is a LayerNorm without weights."""
    return type(norm) is nn.LayerNorm and norm.weight is None


def plain_feed_forward(ff: Any) -> bool:
    """Tell whether it is diffusers' MLP with GELU (tanh) between two linears."""
    if type(ff) is not FeedForward or len(ff.net) != 3:
        return False
    up, dropout, _ = ff.net
    return type(up) is GELU and up.approximate == "tanh" and inert(dropout)


def inert(dropout: Any) -> bool:
    """Tell whether a dropout drops nothing."""
    return not (dropout.training and dropout.p)


def plain_attention(attn: Any, processor: type) -> bool:
    """Tell whether diffusers' ``Attention`` is what ``processor`` does to its projections.

    Its norms of q and k are the caller's business.
    """
    around = attn.group_norm, attn.spatial_norm, attn.norm_cross
    return (
        type(attn.processor) is processor
        and inert(attn.to_out[1])
        and all(norm is None for norm in around)
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
    )


def plain_backend(processor: Any) -> bool:
    """Tell whether a processor that lets diffusers choose a backend gets torch's own attention: its
    setting wins, then what ``attention_backend`` and DIFFUSERS_ATTN_BACKEND set for everyone."""
    own = processor._attention_backend
    return (own or _AttentionBackendRegistry._active_backend) == AttentionBackendName.NATIVE


def heads_of(qkv_BTC: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a shared site's outputs in q, k and v, views, [B, T, heads, D / heads] each."""
    q, k, v = qkv_BTC.unflatten(-1, (3, heads, -1)).unbind(2)
    return q, k, v


def from_table(table_CD: Tensor, timestep_BC: Tensor) -> tuple[Tensor, ...]:
    """Add a block's own table to what the network makes of the time for all blocks, [B, D] each."""
    chunks = len(table_CD)
    return (table_CD[None] + timestep_BC.reshape(len(timestep_BC), chunks, -1)).unbind(1)


def fed_forward(ff: Any, prologue: Prologue) -> Tensor:
    """Compute ff(prologue), [B, T, D]."""
    return read(ff.net[2], gelu(read(ff.net[0].proj, prologue)))
