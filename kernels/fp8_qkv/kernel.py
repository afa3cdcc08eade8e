"""Triton ``fp8_qkv``: q, k and v are read twice and written once in FP8; bound by memory.

``measure`` finds the bounds, ``round_codes`` rotates and rounds. The first ends with v and the
second begins with it: what lies in the cache still is not read from memory again.

Letters: B batch, T queries, S keys, H heads; D channels of a head, HD the power of two that holds
them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..build import Config
from ..chip import capability, chained
from ..formats.hadamard import hadamard_block
from ..transform_quantize.scales import e4m3
from .reference import E4M3_MAX, TINY, Codes

INTERPRETED = bool(triton.knobs.runtime.interpret)

CHUNKS = tl.constexpr(16)
"""Parts that a head's tokens are measured in."""
STEP = 32
"""Tokens that ``measure`` reads at once."""
ROWS, BLOCKS = 64, 8
"""Tokens that are rotated at once, and how often a program does so with one matrix."""

LARGEST = tl.constexpr(E4M3_MAX)
ZERO = tl.constexpr(TINY)


@triton.jit
def _tile(p_x, o_t, last, row, D: tl.constexpr, HD: tl.constexpr):
    """Load tokens ``o_t`` of a head, [tokens, HD]; 0 from token ``last`` on and past D."""
    o_d = tl.arange(0, HD)
    inside = (o_t < last)[:, None] & (o_d < D)[None, :]
    return tl.load(p_x + o_t.to(tl.int64)[:, None] * row + o_d[None, :], mask=inside, other=0.0)


@triton.jit
def measure(
    p_q, p_k, p_v, p_bounds, p_sums, T, S, H,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, chunk_q, chunk_s,
    D: tl.constexpr, HD: tl.constexpr, BS: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Find the longest token of q or k, or v's largest number, of one chunk of one head.

    p_bounds  float32 [3, B H, CHUNKS], of q, k and v; NaN where a number is not finite
    p_sums    float32 [B H, CHUNKS, HD]: k's sums over the chunk's tokens
    CHAIN     launched while the kernel before ends (sm_90+)
    """
    if CHAIN:
        gdc_launch_dependents()
        gdc_wait()
    head, part, of = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (head // H).to(tl.int64), head % H
    if of == 0:
        p_x, row, tokens, chunk = p_q + b * q_batch + h * q_head, q_row, T, chunk_q
    elif of == 1:
        p_x, row, tokens, chunk = p_k + b * k_batch + h * k_head, k_row, S, chunk_s
    else:
        p_x, row, tokens, chunk = p_v + b * v_batch + h * v_head, v_row, S, chunk_s
    total = tl.zeros((BS, HD), dtype=tl.float32)
    largest = tl.zeros((BS, HD), dtype=tl.float32)
    squares = tl.zeros((BS,), dtype=tl.float32)
    last = tl.minimum((part + 1) * chunk, tokens)
    for start in range(part * chunk, last, BS):
        x = _tile(p_x, start + tl.arange(0, BS), last, row, D, HD).to(tl.float32)
        total += x
        largest = tl.maximum(largest, tl.abs(x))
        squares = tl.maximum(squares, tl.sum(x * x, 1))
    sums = tl.sum(total, 0)
    bound = tl.sqrt(tl.max(squares, 0))
    if of == 2:
        bound = tl.max(tl.max(largest, 1), 0)
    at = (head * CHUNKS + part).to(tl.int64)
    # Maxima pass over NaN; sums do not.
    bound += tl.sum(sums, 0) * 0.0
    tl.store(p_bounds + of * tl.num_programs(0) * CHUNKS + at, bound)
    if of == 1:
        tl.store(p_sums + at * HD + tl.arange(0, HD), sums)


@triton.jit
def _signs(HD: tl.constexpr, BLOCK: tl.constexpr):
    """Return blocks of the Hadamard matrix times sqrt(BLOCK), int32 [HD, HD]: the sign is the
    parity of the bits that row and column share."""
    o_i, o_j = tl.arange(0, HD)[:, None], tl.arange(0, HD)[None, :]
    shared = (o_i & o_j) % BLOCK
    shared ^= shared >> 4
    odd = (tl.full((1, 1), 0x6996, dtype=tl.int32) >> (shared & 15)) & 1
    return tl.where(o_i // BLOCK == o_j // BLOCK, 1 - 2 * odd, 0)


@triton.jit
def _store(
    p_codes, x, o_t, tokens, heads, D: tl.constexpr, HD: tl.constexpr, BY_HAND: tl.constexpr
):  # fmt: skip
    o_d = tl.arange(0, HD)
    if BY_HAND:
        x = e4m3(x)
    at = o_t.to(tl.int64)[:, None] * (heads * D) + o_d[None, :]
    inside = (o_t < tokens)[:, None] & (o_d < D)[None, :]
    tl.store(p_codes + at, x.to(p_codes.dtype.element_ty), mask=inside)


@triton.jit
def round_codes(
    p_q, p_k, p_v, p_bounds, p_sums, p_q8, p_k8, p_v8, p_scales, T, S, H,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    D: tl.constexpr, HD: tl.constexpr, BLOCK: tl.constexpr, SHRINK: tl.constexpr,
    BM: tl.constexpr, BLOCKS: tl.constexpr, BY_HAND: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Round BM BLOCKS tokens of one head of v, k or q (in this order along the third axis).

    p_q8 ... p_v8  float8 [B, T, H, D] or [B, S, H, D]
    p_scales       float32 [3, B, H], of q, k and v
    SHRINK         1 / sqrt(BLOCK)
    BY_HAND        round to FP8 in steps: the interpreter's conversion is off where a carry grows
                   the exponent
    """
    if CHAIN:
        gdc_wait()
    head, of = tl.program_id(1), 2 - tl.program_id(2)
    b, h = (head // H).to(tl.int64), head % H
    if of == 0:
        p_x, p_codes, row, tokens = p_q + b * q_batch + h * q_head, p_q8, q_row, T
    elif of == 1:
        p_x, p_codes, row, tokens = p_k + b * k_batch + h * k_head, p_k8, k_row, S
    else:
        p_x, p_codes, row, tokens = p_v + b * v_batch + h * v_head, p_v8, v_row, S
    p_codes += (b * tokens * H + h) * D
    slot = of * tl.num_programs(1) + head
    o_c = tl.arange(0, CHUNKS)
    parts = tl.load(p_bounds + slot * CHUNKS + o_c)
    bound = tl.max(parts, 0) + tl.sum(parts, 0) * 0.0
    mean = tl.zeros((HD,), dtype=tl.float32)
    if of == 1:
        at = (head * CHUNKS + o_c).to(tl.int64)[:, None] * HD + tl.arange(0, HD)[None, :]
        mean = tl.sum(tl.load(p_sums + at), 0) / S
        bound += tl.sqrt(tl.sum(mean * mean, 0))
    some = (bound > ZERO) | (bound != bound)
    steps = tl.where(some, LARGEST / tl.where(some, bound, 1.0), 0.0)
    if tl.program_id(0) == 0:
        tl.store(p_scales + slot, tl.where(some, bound / LARGEST, 1.0))

    first = tl.program_id(0) * BM * BLOCKS
    last = tl.minimum(first + BM * BLOCKS, tokens)
    if of == 2:
        for start in range(first, last, BM):
            o_t = start + tl.arange(0, BM)
            x = _tile(p_x, o_t, last, row, D, HD).to(tl.float32)
            _store(p_codes, x * steps, o_t, last, H, D, HD, BY_HAND)
    elif first < last:
        signs = _signs(HD, BLOCK)
        shift = tl.sum(mean[:, None] * signs.to(tl.float32), 0)
        matrix = signs.to(p_x.dtype.element_ty)
        steps *= SHRINK
        for start in range(first, last, BM):
            o_t = start + tl.arange(0, BM)
            x = tl.dot(_tile(p_x, o_t, last, row, D, HD), matrix) - shift[None, :]
            _store(p_codes, x * steps, o_t, last, H, D, HD, BY_HAND)


def launch(q_BTHd: Tensor, k_BSHd: Tensor, v_BSHd: Tensor) -> Codes:
    """Compute :func:`.reference.quantize` of bf16 or fp16 on the GPU, two launches.

    Heads are a multiple of 16 channels up to 128 wide. Of other strides than channels' being 1, a
    copy is made. There is at least one query and one key.
    """
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q_BTHd, k_BSHd, v_BSHd))
    (b, t, h, d), s = q.shape, k.shape[1]
    heads, chunks = b * h, CHUNKS.value
    q8, k8, v8 = (x.new_empty(x.shape, dtype=torch.float8_e4m3fn) for x in (q, k, v))
    bounds = q.new_empty((3, heads, chunks), dtype=torch.float32)
    sums = q.new_empty((heads, chunks, triton.next_power_of_2(d)), dtype=torch.float32)
    scales = q.new_empty((3, b, h), dtype=torch.float32)
    strides = [n for x in (q, k, v) for n in x.stride()[:3]]
    per_chunk = [triton.cdiv(triton.cdiv(n, chunks), STEP) * STEP for n in (t, s)]
    chip = capability(q.device)
    with torch.cuda.device_of(q):
        measure_config(d, chip).launch(
            (heads, chunks, 3), q, k, v, bounds, sums, t, s, h, *strides, *per_chunk
        )
        round_config(d, chip).launch(
            (triton.cdiv(max(t, s), ROWS * BLOCKS), heads, 3),
            q, k, v, bounds, sums, q8, k8, v8, scales, t, s, h, *strides,
        )  # fmt: skip
    return Codes(q8, k8, v8, scales[0], scales[1], scales[2])


def measure_config(d: int, chip: int | None) -> Config:
    """``d``: channels of a head."""
    wide = triton.next_power_of_2(d)
    constants = {"D": d, "HD": wide, "BS": STEP, "CHAIN": chained(chip)}
    return Config(kernel=measure, constants=constants, early=chained(chip))


def round_config(d: int, chip: int | None) -> Config:
    block, wide = hadamard_block(d, d), triton.next_power_of_2(d)
    constants = {
        "D": d, "HD": wide, "BLOCK": block, "SHRINK": block**-0.5, "BM": ROWS, "BLOCKS": BLOCKS,
        "BY_HAND": INTERPRETED, "CHAIN": chained(chip),
    }  # fmt: skip
    return Config(kernel=round_codes, constants=constants, warps=8, stages=2, early=chained(chip))
