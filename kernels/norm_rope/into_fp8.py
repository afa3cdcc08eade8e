"""Triton ``norm_rope`` into FP8: what attention reads, in the pass that norms and turns it.

Weight, rotary embedding, FP8's scale and the first step of the Hadamard matrix (sums and
differences of pairs) are one 2 x 2 matrix for each pair of a token, which a program makes once for
its heads. A product on the tensor cores does the rest.

Letters as in kernel.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..build import Config
from ..chip import capability, chained
from ..fp8_qkv.kernel import INTERPRETED, signs
from ..fp8_qkv.reference import E4M3_MAX, TINY
from ..transform_quantize.scales import e4m3, exponent, power
from .kernel import apart, float_pairs, pairs, table
from .reference import ROOM, longest, pair_block, per_part

ELEMENTS, HEADS, WARPS = 2048, 6, 4
"""Of a program: numbers that it holds of one head, and heads one after the other."""

LARGEST = tl.constexpr(E4M3_MAX)
ZERO = tl.constexpr(TINY)
LONGEST = tl.constexpr(ROOM * ROOM)


@triton.jit
def _exponent(
    p_weight, p_other, D: tl.constexpr, DP: tl.constexpr, LENGTH: tl.constexpr,
    WEIGHT: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Return e: rows of a head over 2^e lie in FP8's range, whatever they are."""
    o_d = tl.arange(0, DP)
    largest = tl.full([DP], 1.0, tl.float32)
    if WEIGHT:
        largest = tl.abs(tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32))
    if OTHER:
        w = tl.load(p_other + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(w))
    return exponent(tl.maximum(tl.max(largest, 0) * (LENGTH / LARGEST), ZERO))


@triton.jit
def _store(p_to, x, mask, BY_HAND: tl.constexpr):
    if BY_HAND:
        x = e4m3(x)
    tl.store(p_to, x.to(p_to.dtype.element_ty), mask=mask)


@triton.jit
def norm_rope_codes(
    p_x, p_weight, p_other, p_cos, p_sin, p_codes, p_scales, T, H, x_batch, x_token, x_head,
    out_batch, out_token, table_batch, table_token, channel, eps,
    D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, ACROSS: tl.constexpr,
    WEIGHT: tl.constexpr, OTHER: tl.constexpr, ROPE: tl.constexpr, PER_PAIR: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, SHRINK: tl.constexpr, LENGTH: tl.constexpr,
    BY_HAND: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Compute BT tokens and BH heads of one image of one part; arguments as of ``norm_rope``, and:

    p_other   the weight of another part that shares the scales, of OTHER
    p_codes   float8 [B, T, H, D] inside of a tensor with more tokens
    p_scales  float32 [B, H]
    BLOCK     order of the matrix that rotates sums and differences; SHRINK makes both keep lengths
    LENGTH    the longest row of a head, for a weight of ones
    BY_HAND   round to FP8 in steps: the interpreter's conversion is off where a carry grows the
              exponent
    """
    kind = p_x.dtype.element_ty
    matrix = signs(DP // 2, BLOCK).to(kind)
    if CHAIN:
        gdc_launch_dependents()
        gdc_wait()
    batch = tl.program_id(2).to(tl.int64)
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = o_t < T
    o_t = o_t.to(tl.int64)[:, None]
    head = tl.program_id(1) * BH
    heads = tl.minimum(BH, H - head)
    p_x += batch * x_batch + o_t * x_token + head.to(tl.int64) * x_head
    p_codes += batch * out_batch + o_t * out_token + head * D
    p_scales += batch * H + head
    one = tl.full([1], True, tl.int1)
    w_a = tl.full([1, DP // 2], 1.0, tl.float32)
    w_b = w_a
    if WEIGHT and not ACROSS:
        w_a, w_b = float_pairs(p_weight + tl.zeros([1, 1], tl.int32), 1, one, D, DP, 1, INTERLEAVED)
    unit = tl.full([BT], 1.0, tl.float32)
    if not ACROSS:
        e = _exponent(p_weight, p_other, D, DP, LENGTH, WEIGHT, OTHER)
        w_a *= power(-e) * SHRINK
        w_b *= power(-e) * SHRINK
    if ROPE:
        at = batch * table_batch + o_t * table_token
        cos_a, cos_b = table(p_cos + at, channel, m_t, D, DP, BT, INTERLEAVED, PER_PAIR)
        sin_a, sin_b = table(p_sin + at, channel, m_t, D, DP, BT, INTERLEAVED, PER_PAIR)
        squares = cos_a * cos_a + cos_b * cos_b + sin_a * sin_a + sin_b * sin_b
        unit = tl.where(tl.max(squares, 1) <= LONGEST, unit, float("nan"))
        sum_a, sum_b = w_a * (cos_a + sin_b), w_b * (cos_b - sin_a)
        less_a, less_b = w_a * (cos_a - sin_b), w_b * (cos_b + sin_a)
    else:
        sum_a, sum_b, less_a, less_b = w_a, w_b, w_a, w_b
    squares = tl.zeros([BT], tl.float32)
    if ACROSS:
        for i in range(0, heads):
            a, b = float_pairs(p_x + i * x_head, 1, m_t, D, DP, BT, INTERLEAVED)
            squares += tl.sum(a * a + b * b, 1)
        squares /= H
    next_a, next_b = pairs(p_x, 1, m_t, D, DP, BT, INTERLEAVED)
    for i in range(0, heads):
        a, b = next_a.to(tl.float32), next_b.to(tl.float32)
        m_next = m_t & (i + 1 < heads)
        next_a, next_b = pairs(p_x + (i + 1) * x_head, 1, m_next, D, DP, BT, INTERLEAVED)
        if ACROSS:
            e = _exponent(p_weight + i * D, p_other + i * D, D, DP, LENGTH, WEIGHT, OTHER)
            p_w = p_weight + i * D + tl.zeros([1, 1], tl.int32)
            w_a, w_b = float_pairs(p_w, 1, one, D, DP, 1, INTERLEAVED)
            a *= w_a * (power(-e) * SHRINK)
            b *= w_b * (power(-e) * SHRINK)
        else:
            squares = tl.sum(a * a + b * b, 1)
        if tl.program_id(0) == 0:
            tl.store(p_scales + i, power(e))
        # Before the product: after it, the compiler would do all of this once per warp.
        scale = (unit * tl.rsqrt(squares * (1.0 / D) + eps))[:, None]
        a *= scale
        b *= scale
        less = (a * less_a - b * less_b).to(kind)
        a = tl.dot((a * sum_a + b * sum_b).to(kind), matrix)
        b = tl.dot(less, matrix)
        if INTERLEAVED:
            o_d = tl.arange(0, DP)
            mask = m_t[:, None] & (o_d < D)[None, :]
            y = tl.reshape(tl.join(a, b), [BT, DP])
            _store(p_codes + i * D + o_d[None, :], y, mask, BY_HAND)
        else:
            o_half = tl.arange(0, DP // 2)
            mask = m_t[:, None] & (o_half < D // 2)[None, :]
            p_first = p_codes + i * D + o_half[None, :]
            _store(p_first, a, mask, BY_HAND)
            _store(p_first + D // 2, b, mask, BY_HAND)


def launch_codes(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    eps: float,
    cos: Sequence[Tensor | None],
    sin: Sequence[Tensor | None],
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Run :func:`.reference.codes` of what :func:`.why_not_codes` allows; a launch a part."""
    batch, _, heads, dim = parts[0].shape
    tokens = sum(part.shape[1] for part in parts)
    codes = parts[0].new_empty((batch, tokens, heads, dim), dtype=torch.float8_e4m3fn)
    scales = parts[0].new_empty((batch, heads), dtype=torch.float32)
    cos, sin = (per_part(tables, parts) for tables in (cos, sin))
    first = 0
    with torch.cuda.device_of(codes):
        for i, (part, c, s) in enumerate(zip(parts, cos, sin, strict=True)):
            to = codes[:, first : first + part.shape[1]]
            other = weights[1 - i] if len(parts) == 2 else None
            _launch(part, weights[i], other, c, s, to, scales, eps, interleaved)
            first += part.shape[1]
    return codes, scales


def _launch(
    x: Tensor,
    weight: Tensor | None,
    other: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    eps: float,
    interleaved: bool,
) -> None:
    batch, tokens, heads, dim = x.shape
    if x.numel() == 0:
        return
    x = x if x.stride(-1) == 1 else x.contiguous()
    config = codes_config(
        dim, heads, capability(x.device), rope=cos is not None,
        weight=0 if weight is None else weight.numel(), other=other is not None,
        table=dim if cos is None else cos.shape[-1], interleaved=interleaved,
    )  # fmt: skip
    cos, sin, strides = apart(x, cos, sin)
    grid = (
        triton.cdiv(tokens, config.constants["BT"]),
        triton.cdiv(heads, config.constants["BH"]), batch,
    )  # fmt: skip
    config.launch(
        grid, x, *(x if w is None else w.contiguous() for w in (weight, other)), cos, sin, codes,
        scales, tokens, heads, *x.stride()[:3], *codes.stride()[:2], *strides, eps,
    )  # fmt: skip


def codes_config(
    dim: int,
    heads: int,
    chip: int | None,
    *,
    rope: bool,
    weight: int,
    other: bool,
    table: int,
    interleaved: bool,
) -> Config:
    """``dim``, ``weight`` and ``table`` as of ``norm_config``; ``other``: of two parts."""
    wide, block, across = triton.next_power_of_2(dim), pair_block(dim), weight > dim
    constants = {
        "D": dim, "DP": wide, "BT": ELEMENTS // wide, "BH": heads if across else HEADS,
        "ACROSS": across, "WEIGHT": weight > 0, "OTHER": other, "ROPE": rope,
        "PER_PAIR": rope and table < dim, "INTERLEAVED": interleaved, "BLOCK": block,
        "SHRINK": (2 * block) ** -0.5, "LENGTH": longest(dim, heads if across else 1),
        "BY_HAND": INTERPRETED, "CHAIN": chained(chip),
    }  # fmt: skip
    return Config(
        kernel=norm_rope_codes, constants=constants, warps=WARPS, stages=1, early=chained(chip)
    )
