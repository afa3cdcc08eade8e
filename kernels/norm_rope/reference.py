"""Specification of ``norm_rope``: what stands between a linear and the attention that reads it.

    y = x / sqrt(mean(x²) + eps) * weight
    out = y cos + turned(y) sin,  turned: (a, b) -> (-b, a) for each pair of channels

Pairs are neighbours (2i, 2i + 1), or lie half a head apart (i, i + D / 2). Either step may be
missing. Tokens of several parts, each with its weight and its tables, become one tensor.

In FP8-E4M3, for attention, what is normed is rotated too, and has one scale per head:

    codes = e4m3(out H / s)        s = 2^e >= 4 sqrt(D) max |weight| / 448

H is sums and differences of pairs over sqrt(2), then the block Hadamard matrix of D / 2 for each:
together a Hadamard matrix of D, where D is a power of two. Of queries and keys alike it changes no
product. A norm leaves a row's length at sqrt(D) at most and rotations keep it, so s needs no look
at the numbers. There is room for tables that lengthen (YaRN); tokens of tables that lengthen more
are NaN. E4M3 has its three fraction bits over fifteen powers of two: that s is a few times too
large costs nothing.

Letters: B batch, T tokens, H heads, D channels of a head.
"""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..formats.hadamard import block_hadamard, hadamard_block
from ..fp8_qkv.reference import E4M3_MAX, TINY
from ..full_float32 import full_float32

ROOM = 4.0
"""How much longer the tables of a pair, cos and sin of both channels, may make it; of a rotation,
their length is sqrt(2)."""


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
    cos, sin     per part, or one for the tokens of all parts: [B or 1, T or 1, 1, D], or D / 2: one
                 number per pair; None: not turned
    interleaved  whether pairs are neighbours

    Computes in float32 (float64 for float64) and rounds once.
    Raises ValueError for parts that don't go together (:func:`check`).
    """
    check(parts, weights, eps, cos, sin)
    cos, sin = (per_part(tables, parts) for tables in (cos, sin))
    return torch.cat([
        _part(*one, eps, interleaved).to(one[0].dtype)
        for one in zip(parts, weights, cos, sin, strict=True)
    ], 1)  # fmt: skip


def codes(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    eps: float,
    cos: Sequence[Tensor | None],
    sin: Sequence[Tensor | None],
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Return codes, float8_e4m3fn [B, T, H, D], and their scales, float32 [B, H].

    Arguments are those of :func:`norm_rope`; D is a multiple of 4.
    """
    check(parts, weights, eps, cos, sin)
    batch, _, heads, dim = parts[0].shape
    cos, sin = (per_part(tables, parts) for tables in (cos, sin))
    y_BTHD = torch.cat([
        _part(x, w, c, s, eps, interleaved) * _fits(c, s, dim, interleaved)
        for x, w, c, s in zip(parts, weights, cos, sin, strict=True)
    ], 1)  # fmt: skip
    bound = y_BTHD.new_zeros(heads)
    for weight in weights:
        over = 1 if weight is None or weight.numel() == dim else heads
        ones = bound.new_ones(dim) if weight is None else weight.to(bound.dtype)
        largest = ones.view(-1, dim).abs().amax(1) * (longest(dim, over) / E4M3_MAX)
        bound = torch.maximum(bound, largest)
    mantissa, exponent = torch.frexp(bound.clamp(min=TINY))
    scale = torch.exp2((exponent - (mantissa == 0.5).int()).float())
    rounded = (rotated(y_BTHD, interleaved) / scale[:, None]).to(torch.float8_e4m3fn)
    return rounded, scale.expand(batch, heads).contiguous()


def _fits(cos: Tensor | None, sin: Tensor | None, dim: int, interleaved: bool) -> Tensor | float:
    """Return 1 for tokens whose tables lengthen by ROOM at most, NaN for others, [B, T, 1, 1]."""
    if cos is None or sin is None:
        return 1.0
    squares = (per_channel(t.float(), dim, interleaved).square() for t in (cos, sin))
    first, second = _of_pairs(sum(squares), interleaved)  # type: ignore[arg-type]
    longest_pair = (first + second).amax(-1, keepdim=True)
    return torch.where(longest_pair <= ROOM**2, 1.0, torch.nan)


def rotated(x_BTHD: Tensor, interleaved: bool) -> Tensor:
    """Return x H."""
    block = pair_block(x_BTHD.shape[-1])
    first, second = _of_pairs(x_BTHD * 0.5**0.5, interleaved)
    with full_float32():
        sums, differences = (block_hadamard(t, block) for t in (first + second, first - second))
    return _to_pairs(sums, differences, interleaved)


def pair_block(dim: int) -> int:
    """Return the order of the matrix that rotates one channel of each pair."""
    return hadamard_block(dim // 2, dim // 2)


def longest(dim: int, heads: int) -> float:
    """Return how long a head of ``dim`` channels may be, normed over ``heads``, with room."""
    return ROOM * (heads * dim) ** 0.5


def per_part(tables: Sequence[Tensor | None], parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return a table for each part: its rows of one that is for all."""
    if len(tables) == len(parts):
        return tables
    table = tables[0]
    if table is None or table.shape[1] == 1:
        return [table] * len(parts)
    return table.split([part.shape[1] for part in parts], 1)


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
    first, second = _of_pairs(x, interleaved)
    return _to_pairs(-second, first, interleaved)


def _of_pairs(x: Tensor, interleaved: bool) -> Sequence[Tensor]:
    return x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, -1)


def _to_pairs(first: Tensor, second: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack([first, second], -1).flatten(-2)
    return torch.cat([first, second], -1)


def check(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    eps: float | None,
    cos: Sequence[Tensor | None],
    sin: Sequence[Tensor | None],
) -> None:
    """Raise ValueError for parts that differ in more than their tokens, for weights or tables of
    other shapes than :func:`norm_rope` names, and for a weight without a norm."""
    counts = [len(some) for some in (parts, weights, cos, sin)]
    fit = len(cos) in (1, len(parts))
    if not parts or not fit or counts[0] != counts[1] or counts[2] != counts[3]:
        found = "{} parts, {} weights, {} cos, {} sin".format(*counts)
        _refuse(found, "give parts, a weight or None for each, and tables or None for each or all")
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
    tokens = [part.shape[1] for part in parts]
    for count, *tables in zip(tokens if len(cos) > 1 else [sum(tokens)], cos, sin, strict=True):
        shapes = [None if t is None else tuple(t.shape) for t in tables]
        a, b = shapes
        if a is b is None:
            continue
        allowed = [(batch, 1), (count, 1), (1,), (dim, dim // 2)]
        if (
            a is None or a != b or len(a) != 4
            or any(n not in some for n, some in zip(a, allowed, strict=True))
        ):  # fmt: skip
            found = f"cos and sin of shapes {a} and {b} for {count} tokens"
            _refuse(found, f"give [{batch} or 1, {count} or 1, 1, {dim} or {dim // 2}] twice")


def _refuse(found: str, allowed: str) -> NoReturn:
    raise ValueError(f"{found}: {allowed}")
