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

CHUNKS = tl.constexpr(32)
"""Parts that a head's tokens are measured in."""
ELEMENTS, TURNS = 8192, 8
"""Numbers that a program of ``measure`` reads at once, and in how many turns its threads do, each
16 bytes: what one thread holds is reduced first, so that few registers serve many reads."""
ROWS, BLOCKS = 64, 4
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
    D: tl.constexpr, HD: tl.constexpr, BS: tl.constexpr, TURNS: tl.constexpr, FIRST: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    """Find the largest number of one chunk of one head, of q (0), k (1) and v (2) from FIRST on.

    p_bounds  float32 [3, B H, CHUNKS], of q, k and v; NaN where a number is not finite
    p_sums    float32 [B H, CHUNKS, HD]: k's sums over the chunk's tokens
    CHAIN     launched while the kernel before ends (sm_90+)
    """
    if CHAIN:
        gdc_launch_dependents()
        gdc_wait()
    head, part, of = tl.program_id(0), tl.program_id(1), FIRST + tl.program_id(2)
    b, h = (head // H).to(tl.int64), head % H
    if of == 0:
        p_x, row, tokens, chunk = p_q + b * q_batch + h * q_head, q_row, T, chunk_q
    elif of == 1:
        p_x, row, tokens, chunk = p_k + b * k_batch + h * k_head, k_row, S, chunk_s
    else:
        p_x, row, tokens, chunk = p_v + b * v_batch + h * v_head, v_row, S, chunk_s
    total = tl.zeros((BS // TURNS, HD), dtype=tl.float32)
    largest = tl.zeros((BS // TURNS, HD), dtype=tl.float32)
    last = tl.minimum((part + 1) * chunk, tokens)
    for start in range(part * chunk, last, BS):
        x = _tile(p_x, start + tl.arange(0, BS), last, row, D, HD).to(tl.float32)
        turns = tl.reshape(x, [TURNS, BS // TURNS, HD])
        total += tl.sum(turns, 0)
        largest = tl.maximum(largest, tl.max(tl.abs(turns), 0))
    sums = tl.sum(total, 0)
    at = (head * CHUNKS + part).to(tl.int64)
    # Maxima pass over NaN; sums do not.
    bound = tl.max(tl.max(largest, 1), 0) + tl.sum(sums, 0) * 0.0
    tl.store(p_bounds + (of * tl.num_programs(0)).to(tl.int64) * CHUNKS + at, bound)
    if of == 1:
        tl.store(p_sums + at * HD + tl.arange(0, HD), sums)


@triton.jit
def signs(HD: tl.constexpr, BLOCK: tl.constexpr):
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
    """Round BM BLOCKS tokens of one head of v, k or q (in this order along the third axis,
    as far as it goes).

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
        bound += tl.max(tl.abs(mean), 0) + tl.sum(mean, 0) * 0.0
    if of < 2:
        bound /= SHRINK
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
        ones = signs(HD, BLOCK)
        shift = tl.sum(mean[:, None] * ones.to(tl.float32), 0)
        matrix = ones.to(p_x.dtype.element_ty)
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
    codes, scales = _launch([q_BTHd, k_BSHd, v_BSHd])
    return Codes(*codes, *scales)


def launch_values(v_BSHd: Tensor) -> tuple[Tensor, Tensor]:
    """Compute v's codes and scales alone."""
    codes, scales = _launch([v_BSHd])
    return codes[0], scales[2]


def _launch(given: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return codes of what is given, q, k and v or v, and float32 [3, B, H] with their scales."""
    given = [t if t.stride(3) == 1 else t.contiguous() for t in given]
    first = 3 - len(given)
    q, k, v = given if first == 0 else given * 3
    (b, t, h, d), s = q.shape, k.shape[1]
    heads, chunks = b * h, CHUNKS.value
    codes = [x.new_empty(x.shape, dtype=torch.float8_e4m3fn) for x in given]
    bounds = q.new_empty((3, heads, chunks), dtype=torch.float32)
    sums = q.new_empty((heads, chunks, triton.next_power_of_2(d)), dtype=torch.float32)
    scales = q.new_empty((3, b, h), dtype=torch.float32)
    strides = [n for x in (q, k, v) for n in x.stride()[:3]]
    chip = capability(q.device)
    measuring, rounding = measure_config(d, chip, first), round_config(d, chip)
    step = measuring.constants["BS"]
    per_chunk = [triton.cdiv(triton.cdiv(n, chunks), step) * step for n in (t, s)]
    with torch.cuda.device_of(q):
        measuring.launch(
            (heads, chunks, len(given)), q, k, v, bounds, sums, t, s, h, *strides, *per_chunk
        )
        rounding.launch(
            (triton.cdiv(max(t, s), ROWS * BLOCKS), heads, len(given)),
            q, k, v, bounds, sums, *(codes if first == 0 else codes * 3), scales, t, s, h, *strides,
        )  # fmt: skip
    return codes, scales


def measure_config(d: int, chip: int | None, first: int = 0) -> Config:
    """``d``: channels of a head; ``first``: 2 for v alone."""
    wide = triton.next_power_of_2(d)
    constants = {
        "D": d, "HD": wide, "BS": ELEMENTS // wide, "TURNS": TURNS, "FIRST": first,
        "CHAIN": chained(chip),
    }  # fmt: skip
    return Config(kernel=measure, constants=constants, early=chained(chip))


def round_config(d: int, chip: int | None) -> Config:
    block, wide = hadamard_block(d, d), triton.next_power_of_2(d)
    constants = {
        "D": d, "HD": wide, "BLOCK": block, "SHRINK": block**-0.5, "BM": ROWS, "BLOCKS": BLOCKS,
        "BY_HAND": INTERPRETED, "CHAIN": chained(chip),
    }  # fmt: skip
    return Config(kernel=round_codes, constants=constants, warps=8, stages=2, early=chained(chip))
