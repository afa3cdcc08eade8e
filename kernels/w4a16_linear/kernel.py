"""Triton ``w4a16_linear``: one row at the speed of memory, more rows on the tensor cores.

Weights are read as 32-bit words of eight codes: code i of a word stands in bits 4 i ... 4 i + 3 and
belongs to column 8 * word + i (layout L1, little endian). One instruction makes an INT4 code a
float: under the exponent of a power of two its bits are the last bits of the mantissa, so
``(bits & mask) ^ magic`` is offset + code exactly; the offset is taken off the sums (one row,
row.py) or the halves (tensor cores). The magic numbers are arguments and not constants on purpose:
the instruction that does both operations takes one constant only. LM4's levels come from tables
(kernels/lm4_lookup.py), without an offset.

Letters: M rows, N outputs, K inputs, G groups; W words of a tile (8 W columns), BM and BN its rows
and outputs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..buffers import Packed
from ..build import CHIPS, Build, Config
from ..formats.weight import Element
from ..lm4_lookup import INTERPRETED, lm4_pair, lm4_planes, lm4_tables
from .row import HIGH, LOW, one_row, parts
from .tiles import TILES, WIDE_CHIPS, Tile, fits, takes_tables

HALVES = {torch.bfloat16: (0x43084308, 136.0), torch.float16: (0x64086408, 1032.0)}
"""Two 16-bit floats in a word, code bits at 0 ... 3 of each; and the offset they carry."""

_SCALE = "{{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.{}x2 $0, $1, $2, z; }}"
SCALE_BF16, SCALE_FP16 = (tl.constexpr(_SCALE.format(kind)) for kind in ("bf16", "f16"))
"""Two floats times two: minus zero is added, which changes no product."""


@triton.jit
def _halves(bits, magic, OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    """Decode codes i, i + 4 of words (``bits`` shifted right by 4 i), [BN, W] -> [BN, W, 2]."""
    return _joined((bits & 0x000F000F) ^ magic, DTYPE) - OFFSET


@triton.jit
def _joined(pair, DTYPE: tl.constexpr):
    """Take the two 16-bit floats of words apart: [BN, W] -> [BN, W, 2]."""
    low = pair.to(tl.int16).to(DTYPE, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _levels(low, high, SECOND: tl.constexpr, s, DTYPE: tl.constexpr, SCALED: tl.constexpr):
    """Join bytes to LM4's levels (:func:`lm4_pair`), times s [BN, W] if SCALED: [BN, W, 2]."""
    pair = lm4_pair(low, high, SECOND)
    if SCALED and not INTERPRETED:
        # Both at once: of two multiplications by a scalar, ptxas makes one between swaps of halves.
        half = s.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        PTX: tl.constexpr = SCALE_FP16 if DTYPE.is_fp16() else SCALE_BF16
        pair = tl.inline_asm_elementwise(
            PTX, "=r,r,r", [pair, half | (half << 16)], dtype=tl.int32, is_pure=True, pack=1
        )
    levels = _joined(pair, DTYPE)
    return levels * s[:, :, None] if SCALED and INTERPRETED else levels


@triton.jit
def _neighbours(x, SHAPE: tl.constexpr):
    """Split x in ``SHAPE`` [BM, W, 2, 2, 2] by columns 2 i, 2 i + 1 of a word, i = 0 ... 3."""
    even, odd = tl.split(tl.permute(tl.reshape(x, SHAPE), (0, 1, 4, 2, 3)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _multiply(weight, x, s, acc, SCALED: tl.constexpr):
    """Add to acc [BN, BM] weights [BN, W, 2] times their columns x [BM, W, 2]."""
    BM: tl.constexpr = x.shape[0]
    BN: tl.constexpr = weight.shape[0]
    W: tl.constexpr = weight.shape[1]
    if SCALED:
        weight *= s[:, :, None]
    return tl.dot(tl.reshape(weight, [BN, 2 * W]), tl.trans(tl.reshape(x, [BM, 2 * W])), acc)


@triton.jit
def _largest(p_rows, groups, BN: tl.constexpr):
    """Return the largest scale of each of BN rows in float32, at least 1e-30 to have an inverse."""
    top = tl.full([BN], 1e-30, tl.float32)
    for start in range(0, groups, 32):
        o_g = start + tl.arange(0, 32)
        s = tl.load(p_rows[:, None] + o_g[None, :], mask=(o_g < groups)[None, :], other=0.0)
        top = tl.maximum(top, tl.max(s.to(tl.float32), 1))
    return top


@triton.jit
def dots(
    p_x, p_w, p_scale, p_bias, p_y, M, N, units, x_stride, y_stride, scale_stride, magic,
    UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr,
    SUMS: tl.constexpr, OFFSET: tl.constexpr, LM4: tl.constexpr, BIAS: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute y of BM rows and BN outputs; weights are the left operand. Arguments as in row.py.

    SUMS     scales multiply the float32 sums of a step (GROUP is a multiple of W), not the weights
    """
    words = units * UNIT
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.minimum(o_n, N - 1).to(tl.int64)
    m = tl.minimum(o_m, M - 1).to(tl.int64)
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    SCALED: tl.constexpr = GROUP > 0 and not SUMS
    # fp16 has not the range of bf16 scales: its weights are relative to the row's largest one.
    RELATIVE: tl.constexpr = SCALED and p_x.dtype.element_ty.is_fp16()
    if RELATIVE:
        top = _largest(p_scale + n * scale_stride, words // GROUP, BN)  # [BN]
        inverse = 1 / top
    acc = tl.zeros([BN, BM], tl.float32)
    if LM4:
        tables = lm4_tables(N, DTYPE.is_fp16())
    for start in tl.range(0, words, W, num_stages=STAGES):
        o_w = start + tl.arange(0, W)
        o_k = start * 8 + tl.arange(0, 8 * W)
        w_at = p_w + (n * words)[:, None] + o_w[None, :]
        x_at = p_x + (m * x_stride)[:, None] + o_k[None, :]
        if EVEN:
            w = tl.load(w_at)  # [BN, W]
            x = tl.load(x_at)  # [BM, 8 W]
        else:
            w = tl.load(w_at, mask=(o_w < words)[None, :], other=0)
            x = tl.load(x_at, mask=(o_k < words * 8)[None, :], other=0.0)
        s = 0.0
        if SCALED:
            s_at = p_scale + (n * scale_stride)[:, None] + (o_w // GROUP)[None, :]
            inside = (o_w < words)[None, :]
            s = tl.load(s_at) if EVEN else tl.load(s_at, mask=inside, other=0.0)  # [BN, W]
            if RELATIVE:
                s = s.to(tl.float32) * inverse[:, None]
            s = s.to(DTYPE)
        p = tl.zeros([BN, BM], tl.float32) if GROUP > 0 and SUMS else acc
        if LM4:
            x0, x1, x2, x3 = _neighbours(x, [BM, W, 2, 2, 2])
            head, head_high, tail, tail_high = lm4_planes(w, tables)
            p = _multiply(_levels(head, head_high, False, s, DTYPE, SCALED), x0, s, p, False)
            p = _multiply(_levels(head, head_high, True, s, DTYPE, SCALED), x1, s, p, False)
            p = _multiply(_levels(tail, tail_high, False, s, DTYPE, SCALED), x2, s, p, False)
            p = _multiply(_levels(tail, tail_high, True, s, DTYPE, SCALED), x3, s, p, False)
        else:
            x0, x1, x2, x3 = parts(x, [BM, W, 2, 2, 2])
            p = _multiply(_halves(w, magic, OFFSET, DTYPE), x0, s, p, SCALED)
            p = _multiply(_halves(w >> 4, magic, OFFSET, DTYPE), x1, s, p, SCALED)
            p = _multiply(_halves(w >> 8, magic, OFFSET, DTYPE), x2, s, p, SCALED)
            p = _multiply(_halves(w >> 12, magic, OFFSET, DTYPE), x3, s, p, SCALED)
        if GROUP > 0 and SUMS:
            group = tl.load(p_scale + n * scale_stride + start // GROUP)  # [BN]
            acc += p * group.to(tl.float32)[:, None]
        else:
            acc = p
    if GROUP == 0:
        acc *= tl.load(p_scale + n * scale_stride).to(tl.float32)[:, None]
    if RELATIVE:
        acc *= top[:, None]
    if BIAS:
        acc += tl.load(p_bias + n).to(tl.float32)[:, None]
    out = p_y + o_m.to(tl.int64)[None, :] * y_stride + o_n[:, None]
    valid = (o_n < N)[:, None] & (o_m < M)[None, :]
    tl.store(out, acc.to(p_y.dtype.element_ty), mask=valid)


def launch(
    x_MK: Tensor,
    packed: Packed,
    *,
    tile: Tile,
    element: Element = "int4",
    out: Tensor | None = None,
) -> Tensor:
    """Compute y = x (s_w q_w)ᵀ + bias on the GPU; specification: ``reference.py``.

    x_MK     bf16 or fp16, [M, K], any strides
    packed   weights of ``element`` in layout L1, with bf16 scales [N, 1] or one per group of a
             multiple of 32 columns, and bias
    out      [M, N] to write to, bf16, fp16 or float32 with neighbouring columns; None: a new one
    returns  y, [M, N], accumulated in float32, in x's dtype or ``out``

    Raises ValueError for weights that the kernels can't read (:func:`fits`).
    """
    wscale_NG, bias_N = packed.wscale, packed.bias
    (M, K), (N, groups) = x_MK.shape, wscale_NG.shape
    if not fits(K, groups):
        raise ValueError(
            f"weights of {K} columns with {groups} scales per row do not fit the kernels; use a "
            "multiple of 8 columns and one scale per row or groups of a multiple of 32 columns, or "
            "the reference path"
        )
    y_MN = x_MK.new_empty(M, N) if out is None else out
    if y_MN.numel() == 0:
        return y_MN
    if x_MK.stride(1) != 1:
        x_MK = x_MK.contiguous()
    made = config(tile, x_MK.dtype, K, groups, bias=bias_N is not None, lm4=element == "lm4")
    words_NW = packed.qweight.contiguous().view(torch.int32)
    units = words_NW.shape[1] // made.constants["UNIT"]
    pointers = x_MK, words_NW, wscale_NG, wscale_NG if bias_N is None else bias_N, y_MN
    strides = x_MK.stride(0), y_MN.stride(0), wscale_NG.stride(0)
    with torch.cuda.device_of(x_MK):
        if tile.kind == "row":
            grid = triton.cdiv(N, tile.bn), M
            made.launch(grid, *pointers, N, units, *strides, HIGH, LOW)
        else:
            grid = triton.cdiv(N, tile.bn), triton.cdiv(M, tile.bm)
            made.launch(grid, *pointers, M, N, units, *strides, HALVES[x_MK.dtype][0])
    return y_MN


def config(
    tile: Tile,
    dtype: torch.dtype,
    width: int,
    groups: int,
    *,
    bias: bool,
    lm4: bool,
) -> Config:
    """Configure a tile's kernel for x of ``dtype``, K ``width``."""
    group = width // groups // 8 if groups > 1 else 0
    constants: dict[str, Any] = {
        "UNIT": 4 if width % 32 == 0 else 1, "BN": tile.bn, "W": tile.words, "GROUP": group,
        "LM4": lm4, "BIAS": bias, "EVEN": width % (8 * tile.words) == 0, "STAGES": tile.stages,
    }  # fmt: skip
    kernel = one_row if tile.kind == "row" else dots
    if tile.kind == "dots":
        sums = tile.scale == "sums" and group % tile.words == 0
        constants |= {"BM": tile.bm, "SUMS": sums, "OFFSET": HALVES[dtype][1]}
    return Config(kernel=kernel, constants=constants, warps=tile.warps, stages=tile.stages)


def builds() -> list[Build]:
    """List the usual tiles for every chip: groups of 128 and 64, fp16, one scale, masked steps; the
    others, which only measurements choose, for the chips that they are measured on. LM4: bf16 in
    groups of 128, and fp16.
    """
    formats = (
        (torch.bfloat16, 3072, 24),
        (torch.bfloat16, 3072, 48),
        (torch.float16, 3072, 48),
        (torch.bfloat16, 3072, 1),
        (torch.bfloat16, 2240, 35),
    )
    found = []
    for name, tiles in TILES.items():
        for tile in tiles:
            common = name != "wide" and tile is tiles[0]
            chips = CHIPS if common else WIDE_CHIPS
            for dtype, width, groups in formats if tile is tiles[0] else formats[:2]:
                found.append(_build(tile, dtype, width, groups, chips))
            if takes_tables(tile):
                found.append(_build(tile, *formats[0], chips, lm4=True))
            if common:
                found.append(_build(tile, *formats[2], chips, lm4=True))
    return found


def _build(
    tile: Tile,
    dtype: torch.dtype,
    width: int,
    groups: int,
    chips: tuple[int, ...],
    *,
    lm4: bool = False,
) -> Build:
    made = config(tile, dtype, width, groups, bias=True, lm4=lm4)
    kinds = {"p_x": "*bf16", "p_w": "*i32", "p_scale": "*bf16", "p_bias": "*bf16", "p_y": "*bf16"}
    if dtype == torch.float16:
        kinds |= {"p_x": "*fp16", "p_y": "*fp16"}
    return Build.of(
        made,
        kinds,
        aligned=("x_stride", "y_stride"),
        name=f"{tile.kind}-{tile.bm}x{tile.bn}x{tile.words}"
        f"-w{tile.warps}s{tile.stages}-{tile.scale}-{kinds['p_x'][1:]}-k{width}g{groups}"
        + ("-lm4" if lm4 else ""),
        chips=chips,
        tensor_core=tile.kind == "dots",
        spills=8 if lm4 and tile.kind == "dots" else 0,  # tables take registers, of sm_120 too
    )
