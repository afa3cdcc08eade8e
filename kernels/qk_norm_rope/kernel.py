"""Triton ``qk_norm_rope``: every number is read once and written once, in 16 bytes a thread.

A program takes a block of tokens of one part and image and a few heads one after the other: the
tokens' cos and sin and the weights stay in registers.

Letters: B batch, T tokens, C columns, H heads, D channels of a head; BT tokens of a program, DP the
power of two that holds D.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from ..build import Config
from ..chip import capability, chained
from .reference import Part, Rope, check, columns

ELEMENTS = 1024
"""Of a program's block [BT, DP]: two accesses of 16 bytes for each of its threads."""
HEADS = 2
"""Heads of a program: enough to share cos and sin, few enough for many programs."""
WARPS = 4


@triton.jit
def _pairs(x, BT: tl.constexpr, DP: tl.constexpr):
    """Split [BT, DP] into even and odd channels, [BT, DP / 2] each."""
    return tl.split(tl.reshape(x, [BT, DP // 2, 2]))


@triton.jit
def _one_head(
    p_from, p_to, m_TD, weight, cos_even, cos_odd, sin_even, sin_odd, eps,
    D: tl.constexpr, BT: tl.constexpr, DP: tl.constexpr, WEIGHT: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Norm, turn and store q or k of BT tokens and one head."""
    x = tl.load(p_from, mask=m_TD, other=0.0).to(tl.float32)  # [BT, DP]
    x *= tl.rsqrt(tl.sum(x * x, 1) * (1.0 / D) + eps)[:, None]
    if WEIGHT:
        x *= weight
    if ROPE:
        even, odd = _pairs(x, BT, DP)
        x = tl.join(even * cos_even - odd * sin_even, odd * cos_odd + even * sin_odd)
        x = tl.reshape(x, [BT, DP])
    tl.store(p_to, x.to(p_to.dtype.element_ty), mask=m_TD)


@triton.jit
def norm_rope(
    p_a, p_a_q, p_a_k, p_b, p_b_q, p_b_k, p_cos, p_sin, p_q, p_k, p_v,
    tokens_a, tokens_b, blocks_a, H, a_batch, a_row, b_batch, b_row, eps,
    D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
    Q_WEIGHT: tl.constexpr, K_WEIGHT: tl.constexpr, ROPE: tl.constexpr, COPY: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    """Compute q, k and with COPY v of BT tokens and BH heads of one image.

    p_a, p_b        the parts, [B, tokens_*, C]: batches lie ``*_batch`` apart and rows ``*_row``
    p_a_q ... p_cos  [D] each, [tokens_a + tokens_b, D]; anything where Q_WEIGHT ... ROPE say so
    p_q, p_k, p_v   [B, tokens_a + tokens_b, H, D]
    CHAIN           launched while the product that makes p_a still ends (sm_90+)
    blocks_a        programs of part a along the grid's first axis, before those of b
    """
    if CHAIN:
        gdc_wait()
    block = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    if block < blocks_a:
        p_x, p_q_weight, p_k_weight = p_a + batch * a_batch, p_a_q, p_a_k
        row, tokens, start, first = a_row, tokens_a, block * BT, 0
    else:
        p_x, p_q_weight, p_k_weight = p_b + batch * b_batch, p_b_q, p_b_k
        row, tokens, start, first = b_row, tokens_b, (block - blocks_a) * BT, tokens_a
    o_t = start + tl.arange(0, BT)
    o_d = tl.arange(0, DP)
    m_d = o_d < D
    m_TD = (o_t < tokens)[:, None] & m_d[None, :]
    o_t = o_t.to(tl.int64)
    head = tl.program_id(1) * BH
    p_x += (o_t * row + head * D)[:, None] + o_d[None, :]
    at = batch * (tokens_a + tokens_b) + first + o_t
    o_out = (at * (H * D) + head * D)[:, None] + o_d[None, :]
    cos_even, cos_odd, sin_even, sin_odd = 1.0, 1.0, 0.0, 0.0
    if ROPE:
        o_rope = ((first + o_t) * D)[:, None] + o_d[None, :]
        cos = tl.load(p_cos + o_rope, mask=m_TD, other=0.0)
        sin = tl.load(p_sin + o_rope, mask=m_TD, other=0.0)
        cos_even, cos_odd = _pairs(cos, BT, DP)
        sin_even, sin_odd = _pairs(sin, BT, DP)
    q_weight, k_weight = 1.0, 1.0
    if Q_WEIGHT:
        q_weight = tl.load(p_q_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if K_WEIGHT:
        k_weight = tl.load(p_k_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    for i in range(0, tl.minimum(BH, H - head)):
        p_from, to = p_x + i * D, o_out + i * D
        _one_head(
            p_from, p_q + to, m_TD, q_weight, cos_even, cos_odd, sin_even, sin_odd, eps,
            D, BT, DP, Q_WEIGHT, ROPE,
        )  # fmt: skip
        _one_head(
            p_from + H * D, p_k + to, m_TD, k_weight, cos_even, cos_odd, sin_even, sin_odd, eps,
            D, BT, DP, K_WEIGHT, ROPE,
        )  # fmt: skip
        if COPY:
            tl.store(p_v + to, tl.load(p_from + 2 * H * D, mask=m_TD, other=0.0), mask=m_TD)


def launch(
    parts: Sequence[Part], rope: Rope | None, *, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Run :func:`.reference.qk_norm_rope` on bf16 or fp16 on the GPU, rounded once; one launch.

    D is a multiple of 8 up to 256. Allocates q and k, and v of two parts.
    """
    dim = check(parts, rope, heads)
    a, b = parts[0], parts[-1]
    x = a.qkv_BTC
    copy = len(parts) == 2
    tokens = x.shape[1], b.qkv_BTC.shape[1] if copy else 0
    shape = len(x), sum(tokens), heads, dim
    q, k = x.new_empty(shape), x.new_empty(shape)
    v = x.new_empty(shape) if copy else columns(x, heads, dim)[2]
    if q.numel() == 0:
        return q, k, v
    config = norm_config(
        dim, capability(x.device), rope=rope is not None, copy=copy,
        q_weight=a.q_weight is not None, k_weight=a.k_weight is not None,
    )  # fmt: skip
    weights = [
        [x if w is None else w.contiguous() for w in (p.q_weight, p.k_weight)] for p in (a, b)
    ]
    cos, sin = (x, x) if rope is None else (t.contiguous() for t in rope)
    blocks = [triton.cdiv(t, config.constants["BT"]) for t in tokens]
    grid = sum(blocks), triton.cdiv(heads, HEADS), len(x)
    strides = (*x.stride()[:2], *b.qkv_BTC.stride()[:2])
    with torch.cuda.device_of(x):
        config.launch(
            grid, x, *weights[0], b.qkv_BTC, *weights[1], cos, sin, q, k, v if copy else q,
            *tokens, blocks[0], heads, *strides, eps,
        )  # fmt: skip
    return q, k, v


def norm_config(
    dim: int, chip: int | None, *, rope: bool, copy: bool, q_weight: bool, k_weight: bool
) -> Config:
    """``dim``: channels of a head; ``copy``: of two parts, whose v are put together."""
    wide = triton.next_power_of_2(dim)
    constants = {
        "D": dim, "DP": wide, "BT": ELEMENTS // wide, "BH": HEADS, "Q_WEIGHT": q_weight,
        "K_WEIGHT": k_weight, "ROPE": rope, "COPY": copy, "CHAIN": chained(chip),
    }  # fmt: skip
    return Config(kernel=norm_rope, constants=constants, warps=WARPS, stages=1, early=chained(chip))
