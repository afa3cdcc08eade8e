"""Triton ``norm_rope``: every number is read once and written once, in 16 bytes a thread.

A program takes a block of tokens of one image and a few heads one after the other: the tokens' cos
and sin stay in registers. Several parts are several launches into one result.

Letters: B batch, T tokens, H heads, D channels of a head; BT tokens of a program, DP the power of
two that holds D.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from ..build import Config
from ..chip import capability, chained
from .reference import per_part

ELEMENTS = 1024
"""Of a program's block [BT, DP]: 16 bytes for each of its threads."""
HEADS = 4
"""Heads of a program: enough to share cos and sin, few enough for many programs."""
WARPS = 4


@triton.jit
def pairs(
    p_row, channel, m_row, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Read rows [ROWS, D] as the first and second channels of pairs, [ROWS, DP / 2] each.

    p_row    [ROWS, 1], each row's first number; the next one lies ``channel`` behind
    """
    o_half = tl.arange(0, DP // 2)
    if INTERLEAVED:
        o_d = tl.arange(0, DP)
        mask = m_row[:, None] & (o_d < D)[None, :]
        x = tl.load(p_row + (o_d * channel)[None, :], mask=mask, other=0.0)
        first, second = tl.split(tl.reshape(x, [ROWS, DP // 2, 2]))
    else:
        mask = m_row[:, None] & (o_half < D // 2)[None, :]
        p_first = p_row + (o_half * channel)[None, :]
        first = tl.load(p_first, mask=mask, other=0.0)
        second = tl.load(p_first + D // 2 * channel, mask=mask, other=0.0)
    return first, second


@triton.jit
def float_pairs(
    p_row, channel, m_row, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Read them as float32."""
    first, second = pairs(p_row, channel, m_row, D, DP, ROWS, INTERLEAVED)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def table(
    p_row, channel, m_row, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr, PER_PAIR: tl.constexpr,
):  # fmt: skip
    """Read cos or sin of both channels of pairs; PER_PAIR: they have one number."""
    if PER_PAIR:
        o_half = tl.arange(0, DP // 2)
        mask = m_row[:, None] & (o_half < D // 2)[None, :]
        first = tl.load(p_row + (o_half * channel)[None, :], mask=mask, other=0.0).to(tl.float32)
        second = first
    else:
        first, second = float_pairs(p_row, channel, m_row, D, DP, ROWS, INTERLEAVED)
    return first, second


@triton.jit
def norm_rope(
    p_x, p_weight, p_cos, p_sin, p_out, T, H, x_batch, x_token, x_head, out_batch, out_token,
    table_batch, table_token, channel, eps,
    D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, NORM: tl.constexpr,
    ACROSS: tl.constexpr, WEIGHT: tl.constexpr, ROPE: tl.constexpr, PER_PAIR: tl.constexpr,
    INTERLEAVED: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Compute BT tokens and BH heads of one image of one part.

    p_x       [B, T, H, D]: batches, tokens and heads lie x_* apart, channels are neighbours
    p_weight  [D], of ACROSS [H D]; p_cos, p_sin  [B, T, D], of PER_PAIR [B, T, D / 2], channels lie
              ``channel`` apart; anything where WEIGHT or ROPE say so
    p_out     [B, T, H, D] inside of a tensor with more tokens
    ACROSS    the norm is over all heads; BH is H or more
    CHAIN     launched while the kernel that makes p_x still ends (sm_90+)
    """
    if CHAIN:
        gdc_wait()
    batch = tl.program_id(2).to(tl.int64)
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = o_t < T
    o_t = o_t.to(tl.int64)[:, None]
    head = tl.program_id(1) * BH
    heads = tl.minimum(BH, H - head)
    p_x += batch * x_batch + o_t * x_token + head.to(tl.int64) * x_head
    p_out += batch * out_batch + o_t * out_token + head * D
    one = tl.full([1], True, tl.int1)
    squares = tl.zeros([BT], tl.float32)
    if ACROSS:
        for i in range(0, heads):
            a, b = float_pairs(p_x + i * x_head, 1, m_t, D, DP, BT, INTERLEAVED)
            squares += tl.sum(a * a + b * b, 1)
        squares /= H
    if WEIGHT and not ACROSS:
        w_a, w_b = float_pairs(p_weight + tl.zeros([1, 1], tl.int32), 1, one, D, DP, 1, INTERLEAVED)
    if ROPE:
        at = batch * table_batch + o_t * table_token
        cos_a, cos_b = table(p_cos + at, channel, m_t, D, DP, BT, INTERLEAVED, PER_PAIR)
        sin_a, sin_b = table(p_sin + at, channel, m_t, D, DP, BT, INTERLEAVED, PER_PAIR)
    for i in range(0, heads):
        a, b = float_pairs(p_x + i * x_head, 1, m_t, D, DP, BT, INTERLEAVED)
        if NORM:
            if not ACROSS:
                squares = tl.sum(a * a + b * b, 1)
            scale = tl.rsqrt(squares * (1.0 / D) + eps)[:, None]
            a *= scale
            b *= scale
        if WEIGHT:
            if ACROSS:
                p_w = p_weight + i * D + tl.zeros([1, 1], tl.int32)
                w_a, w_b = float_pairs(p_w, 1, one, D, DP, 1, INTERLEAVED)
            a *= w_a
            b *= w_b
        if ROPE:
            turned = b * cos_b + a * sin_b
            a = a * cos_a - b * sin_a
            b = turned
        kind = p_out.dtype.element_ty
        if INTERLEAVED:
            o_d = tl.arange(0, DP)
            mask = m_t[:, None] & (o_d < D)[None, :]
            y = tl.reshape(tl.join(a, b), [BT, DP]).to(kind)
            tl.store(p_out + i * D + o_d[None, :], y, mask=mask)
        else:
            o_half = tl.arange(0, DP // 2)
            mask = m_t[:, None] & (o_half < D // 2)[None, :]
            p_first = p_out + i * D + o_half[None, :]
            tl.store(p_first, a.to(kind), mask=mask)
            tl.store(p_first + D // 2, b.to(kind), mask=mask)


def launch(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    eps: float | None,
    cos: Sequence[Tensor | None],
    sin: Sequence[Tensor | None],
    interleaved: bool,
) -> Tensor:
    """Run :func:`.reference.norm_rope` on bf16 or fp16 on the GPU, rounded once; a launch a part.

    D is a multiple of 8; arguments are those that :func:`.reference.check` lets pass.
    """
    batch, _, heads, dim = parts[0].shape
    out = parts[0].new_empty((batch, sum(part.shape[1] for part in parts), heads, dim))
    cos, sin = (per_part(tables, parts) for tables in (cos, sin))
    first = 0
    with torch.cuda.device_of(out):
        for part, weight, c, s in zip(parts, weights, cos, sin, strict=True):
            to = out[:, first : first + part.shape[1]]
            _launch(part, weight, c, s, to, eps, interleaved)
            first += part.shape[1]
    return out


def _launch(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor,
    eps: float | None,
    interleaved: bool,
) -> None:
    batch, tokens, heads, dim = x.shape
    if x.numel() == 0:
        return
    x = x if x.stride(-1) == 1 else x.contiguous()
    rope = cos is not None
    cos, sin, strides = apart(x, cos, sin)
    config = norm_config(
        dim, heads, capability(x.device), norm=eps is not None, rope=rope,
        weight=0 if weight is None else weight.numel(), table=cos.shape[-1],
        interleaved=interleaved,
    )  # fmt: skip
    grid = (
        triton.cdiv(tokens, config.constants["BT"]),
        triton.cdiv(heads, config.constants["BH"]), batch,
    )  # fmt: skip
    config.launch(
        grid, x, x if weight is None else weight.contiguous(), cos, sin, out, tokens, heads,
        *x.stride()[:3], *out.stride()[:2], *strides, eps or 0.0,
    )  # fmt: skip


def apart(
    x: Tensor, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Return tables, or x for none, and how far their batches, tokens and channels lie apart."""
    if cos is None or sin is None:
        cos = sin = x
    elif cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    strides = [s if n > 1 else 0 for n, s in zip(cos.shape, cos.stride(), strict=True)]
    return cos, sin, (strides[0], strides[1], strides[3])


def norm_config(
    dim: int,
    heads: int,
    chip: int | None,
    *,
    norm: bool,
    rope: bool,
    weight: int,
    table: int,
    interleaved: bool,
) -> Config:
    """``dim``: channels of a head; ``weight``: numbers of the weight, 0 without one; ``table``:
    channels of cos and sin."""
    wide = triton.next_power_of_2(dim)
    across = weight > dim
    constants = {
        "D": dim, "DP": wide, "BT": max(1, ELEMENTS // wide), "BH": heads if across else HEADS,
        "NORM": norm, "ACROSS": across, "WEIGHT": weight > 0, "ROPE": rope,
        "PER_PAIR": rope and table < dim, "INTERLEAVED": interleaved, "CHAIN": chained(chip),
    }  # fmt: skip
    return Config(kernel=norm_rope, constants=constants, warps=WARPS, stages=1, early=chained(chip))
