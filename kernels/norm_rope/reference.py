"""Specification of ``norm_rope``: what stands between a linear and the attention that reads it.

    y = x / sqrt(mean(x²) + eps) * weight
    out = y cos + turned(y) sin,  turned: (a, b) -> (-b, a) for each pair of channels

Pairs are neighbours (2i, 2i + 1), or lie half a head apart (i, i + D / 2). Either step may be
missing. Tokens of several parts, each with its weight and its tables, become one tensor.

Letters: B batch, T tokens, H heads, D channels of a head.
"""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor


def norm_rope(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    eps: float | None,
    cos: Sequence[Tensor | None],
    sin: Sequence[Tensor | None],
    interleaved: bool,
) -> Tensor:
    """Return normed and turned tokens, [B, T, H, D] in the parts' dtype, part after part.

    parts        [B, T of the part, H, D] each, lying anywhere
    weights      per part: [D] multiplies what was normed over D; [H D]: over all heads; None: 1
    eps          is added to the mean of squares; None: nothing is normed
    cos, sin     per part: [B or 1, T or 1, 1, D], or D / 2: one number per pair; None: not turned
    interleaved  whether pairs are neighbours

    Computes in float32 (float64 for float64) and rounds once.
    Raises ValueError for parts that don't go together (:func:`check`).
    """
    check(parts, weights, eps, cos, sin)
    return torch.cat([
        _part(*one, eps, interleaved).to(one[0].dtype)
        for one in zip(parts, weights, cos, sin, strict=True)
    ], 1)  # fmt: skip


def _part(
    x_BTHD: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float | None,
    interleaved: bool,
) -> Tensor:
    dim = x_BTHD.shape[-1]
    x = x_BTHD.to(torch.promote_types(x_BTHD.dtype, torch.float32))
    if eps is not None:
        over = (-1,) if weight is None or weight.numel() == dim else (-2, -1)
        x = x * torch.rsqrt(x.square().mean(over, keepdim=True) + eps)
        if weight is not None:
            x = x * weight.to(x.dtype).view(-1, dim)
    if cos is not None and sin is not None:
        cos, sin = (per_channel(t, dim, interleaved).to(x.dtype) for t in (cos, sin))
        x = x * cos + _turned(x, interleaved) * sin
    return x


def per_channel(table: Tensor, dim: int, interleaved: bool) -> Tensor:
    """Return a table with a number for each of ``dim`` channels."""
    if table.shape[-1] == dim:
        return table
    return table.repeat_interleave(2, -1) if interleaved else torch.cat([table, table], -1)


def _turned(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([-second, first], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def check(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    eps: float | None,
    cos: Sequence[Tensor | None],
    sin: Sequence[Tensor | None],
) -> None:
    """Raise ValueError for parts that differ in more than their tokens, for weights or tables of
    other shapes than :func:`norm_rope` names, and for a weight without a norm."""
    if not parts or not len(parts) == len(weights) == len(cos) == len(sin):
        found = f"{len(parts)} parts, {len(weights)} weights, {len(cos)} cos, {len(sin)} sin"
        _refuse(found, "give a weight, cos and sin, or None, for each part, and at least one part")
    if any(part.ndim != 4 or part.shape[-1] % 2 for part in parts):
        found = f"parts of shapes {[tuple(part.shape) for part in parts]}"
        _refuse(found, "give [batch, tokens, heads, channels] with an even number of channels")
    kinds = {(len(p), *p.shape[2:], p.dtype, p.device) for p in parts}
    if len(kinds) > 1:
        found = f"parts of (batch, heads, channels, dtype, device) {sorted(map(str, kinds))}"
        _refuse(found, "give parts that differ in their tokens only")
    batch, _, heads, dim = parts[0].shape
    for weight in weights:
        if weight is not None and (eps is None or weight.numel() not in (dim, heads * dim)):
            found = f"a weight of {weight.numel()} for {heads} heads of {dim} and eps {eps}"
            _refuse(found, f"give {dim} or {heads * dim} numbers, and eps")
    for part, *tables in zip(parts, cos, sin, strict=True):
        shapes = [None if t is None else tuple(t.shape) for t in tables]
        if shapes == [None, None]:
            continue
        a, b = shapes
        allowed = [(batch, 1), (part.shape[1], 1), (1,), (dim, dim // 2)]
        if (
            a is None or a != b or len(a) != 4
            or any(n not in some for n, some in zip(a, allowed, strict=True))
        ):  # fmt: skip
            found = f"cos and sin of shapes {a} and {b} for a part of {tuple(part.shape)}"
            _refuse(found, f"give [{batch} or 1, tokens or 1, 1, {dim} or {dim // 2}] twice")


def _refuse(found: str, allowed: str) -> NoReturn:
    raise ValueError(f"{found}: {allowed}")
