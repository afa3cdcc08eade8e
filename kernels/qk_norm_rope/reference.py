"""Specification of ``qk_norm_rope``: what stands between FLUX's qkv linears and its attention.

    q' = rope(q / sqrt(mean(q²) + eps) * weight), k' likewise, v' = v

Rotary embedding turns neighbours: (a, b) -> (a cos - b sin, b cos + a sin).

Letters: B batch, T tokens, C columns of the wide linear, H heads, D channels of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

Rope = tuple[Tensor, Tensor]
"""cos and sin, float32, [T, D]: a number per channel, the two of a pair side by side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tokens that came through one wide linear.

    qkv_BTC    bf16, fp16, float32 or float64, [B, T, C]: the columns of q, k and v side by side,
               H D each, and any others behind them. Batch and rows lie anywhere, columns are
               neighbours.
    q_weight   [D], multiplies the normed q; None: nothing does
    k_weight   [D], likewise
    """

    qkv_BTC: Tensor
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None


def qk_norm_rope(
    parts: Sequence[Part], rope: Rope | None, *, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return normed and turned q and k, and v, of all parts' tokens, one part after the other.

    rope     [T, D] each, T the tokens of all parts; None: nothing is turned
    eps      is added to the mean of squares
    returns  q, k, v, [B, T, H, D] each in the parts' dtype; v of a single part is a view of it

    Rounds as diffusers does: the normed q and k to the parts' dtype, then float32, then again.
    Raises ValueError for parts that don't go together (:func:`check`).
    """
    dim = check(parts, rope, heads)
    split = [columns(part.qkv_BTC, heads, dim) for part in parts]
    dtype = parts[0].qkv_BTC.dtype
    q = torch.cat([_normed(q, part.q_weight, eps) for (q, _, _), part in zip(split, parts)], 1)
    k = torch.cat([_normed(k, part.k_weight, eps) for (_, k, _), part in zip(split, parts)], 1)
    v = split[0][2] if len(split) == 1 else torch.cat([v for _, _, v in split], 1)
    if rope is not None:
        q, k = _turned(q, rope), _turned(k, rope)
    return q.to(dtype), k.to(dtype), v


def columns(qkv_BTC: Tensor, heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of a wide linear's outputs: views, [B, T, H, D] each."""
    q, k, v = (
        qkv_BTC[..., i * heads * dim : (i + 1) * heads * dim].unflatten(-1, (heads, dim))
        for i in range(3)
    )
    return q, k, v


def _normed(x_BTHD: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    return rms_norm(x_BTHD, (x_BTHD.shape[-1],), weight_D, eps)


def _turned(x_BTHD: Tensor, rope: Rope) -> Tensor:
    """Turn in float32 (float64 for float64), round to x's dtype."""
    wide = torch.promote_types(x_BTHD.dtype, torch.float32)
    cos, sin = (t[:, None].to(wide) for t in rope)  # [T, 1, D]
    first, second = x_BTHD.unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-second, first], -1).flatten(-2)
    return (x_BTHD.to(wide) * cos + across.to(wide) * sin).to(x_BTHD.dtype)


def check(parts: Sequence[Part], rope: Rope | None, heads: int) -> int:
    """Return D, the channels of a head: what weights and rope have, or a third of the columns / H.

    Raises ValueError for anything but one or two parts alike in batch, dtype, device and weights,
    with columns for H heads, and a rope of their tokens.
    """
    if len(parts) not in (1, 2):
        _refuse(f"{len(parts)} parts", "give one part, or two that attend to each other")
    first = parts[0].qkv_BTC
    for part in parts:
        x = part.qkv_BTC
        if x.ndim != 3 or (x.shape[-1] > 1 and x.stride(-1) != 1):
            found = f"qkv of shape {tuple(x.shape)} and strides {x.stride()}"
            _refuse(found, "give [batch, tokens, columns] with neighbouring columns")
        if (len(x), x.dtype, x.device) != (len(first), first.dtype, first.device):
            found = ", ".join(f"batch {len(t)} of {t.dtype} on {t.device}" for t in (first, x))
            _refuse(f"parts with {found}", "give parts of one batch, dtype and device")
    for name in ("q_weight", "k_weight"):
        if len({getattr(part, name) is None for part in parts}) > 1:
            _refuse(f"one part with a {name} and one without", "give it to both or none")
    weights = [w for part in parts for w in (part.q_weight, part.k_weight) if w is not None]
    if len(kinds := {w.dtype for w in weights}) > 1:
        _refuse(f"weights in {sorted(map(str, kinds))}", "give them in one dtype")
    dims = {tuple(w.shape) for w in weights} | {(t.shape[-1],) for t in rope or ()}
    if len(dims) > 1:
        _refuse(f"weights and rope of shapes {sorted(dims)}", "give one number per channel")
    dim = next(iter(dims))[-1] if dims else first.shape[-1] // (3 * heads)
    if dim < 2 or dim % 2:
        _refuse(f"heads of {dim} channels", "give an even number of them")
    for part in parts:
        if part.qkv_BTC.shape[-1] < 3 * heads * dim:
            found = f"{part.qkv_BTC.shape[-1]} columns for q, k, v of {heads} heads of {dim}"
            _refuse(found, f"give at least {3 * heads * dim}")
    tokens = sum(part.qkv_BTC.shape[1] for part in parts)
    if rope is not None and any(t.shape != (tokens, dim) for t in rope):
        found = f"rope of shapes {[tuple(t.shape) for t in rope]} for {tokens} tokens"
        _refuse(found, f"give two of [{tokens}, {dim}]")
    return dim


def _refuse(found: str, allowed: str) -> NoReturn:
    raise ValueError(f"{found}: {allowed}")
