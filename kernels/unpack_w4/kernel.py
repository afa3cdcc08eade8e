"""Triton ``unpack_w4``: eight nibbles at a time, in 32-bit words; bound by memory.

Letters: N outputs, K main-branch inputs, R low-rank directions (RT: rounded up to 16).
"""

import torch
import triton
import triton.language as tl

from ..appended import BIAS_COEFFICIENT, appended_part, columns_with_appended
from ..buffers import Packed, Unpacked
from ..build import CHIPS, FP8_CHIPS, Build, Config
from ..formats.weight import Element
from ..lm4_lookup import lm4_bytes
from ..permuted import BLOCK, padded
from ..transform_quantize.scales import e4m3

WORDS = tl.constexpr(8)
"""int32 words of one 64-column block in layout L1."""

ROWS = 16
"""Of a program that appends columns."""


@triton.jit
def _bytes(nibbles, FP8: tl.constexpr):
    """Make four two's complement nibbles, one per byte, four int8 or four E4M3 subnormals."""
    sign = (nibbles >> 3) & 0x01010101
    if FP8:
        magnitude = (nibbles ^ ((sign << 4) - sign)) + sign
        return magnitude | (sign << 7)
    return nibbles | ((sign << 8) - (sign << 4))


@triton.jit
def unpack(
    p_q, p_out, p_codes, p_scale, p_wp, p_bias, p_scale32, N, blocks, words, row_words, row_bytes,
    main, n_main, n_blocks, one,
    R: tl.constexpr, RT: tl.constexpr, T: tl.constexpr, FP8: tl.constexpr, LM4: tl.constexpr,
    BIAS: tl.constexpr, RAGGED: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Unpack BB 64-column blocks each (programs below ``n_main``), or append to BN rows.

    blocks  64-column blocks of a row; words: int32 words of a row of ``p_q``
    p_codes p_out as codes; main: columns before the appended ones
    one     coefficient that the bias's direction has in the activations
    """
    pid = tl.program_id(0)
    if pid < n_main:
        block = pid * BB + tl.arange(0, BB)
        word = tl.arange(0, WORDS)
        row = block // blocks
        column = block % blocks
        mask = (block < n_blocks)[:, None]
        if RAGGED:
            source = row.to(tl.int64)[:, None] * words + (column * WORDS)[:, None] + word[None, :]
            inside = mask & ((column * WORDS)[:, None] + word[None, :] < words)
        else:
            source = block.to(tl.int64)[:, None] * WORDS + word[None, :]
            inside = mask
        packed = tl.load(p_q + source, mask=inside, other=0)  # [BB, 8]
        target = row.to(tl.int64)[:, None] * row_words + (column * 16)[:, None] + word[None, :]
        if LM4:
            even, odd = lm4_bytes(packed, FP8)
            if RAGGED:  # LM4 has no zero, which the columns past the last one are
                even, odd = tl.where(inside, even, 0), tl.where(inside, odd, 0)
        else:
            even = _bytes(packed & 0x0F0F0F0F, FP8)
            odd = _bytes((packed >> 4) & 0x0F0F0F0F, FP8)
        tl.store(p_out + target, even, mask=mask)
        tl.store(p_out + target + WORDS, odd, mask=mask)
    else:
        o_n = (pid - n_main) * BN + tl.arange(0, BN)
        o_t = tl.arange(0, T)
        part = o_t // RT
        o_r = o_t % RT
        m_n = o_n < N
        scale = tl.load(p_scale + o_n, mask=m_n, other=0.0).to(tl.float32)
        tl.store(p_scale32 + o_n, scale, mask=m_n)
        inverse = tl.where(scale > 0, 0.5 / tl.where(scale > 0, scale, 1.0), 0.0)
        v = tl.zeros((BN, T), dtype=tl.float32)
        if R > 0:
            m_wp = m_n[:, None] & ((o_r < R) & (part < 3))[None, :]
            v = tl.load(p_wp + o_n[:, None] * R + o_r[None, :], mask=m_wp, other=0.0).to(tl.float32)
        if BIAS:
            bias = tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32) / one
            v = tl.where(((o_r == R) & (part < 3))[None, :], bias[:, None], v)
        v = v * inverse[:, None]
        high = e4m3(v)
        v = tl.where((part == 2)[None, :], v - high, high)
        m_t = m_n[:, None] & (main + o_t < row_bytes)[None, :]
        out = p_codes + o_n.to(tl.int64)[:, None] * row_bytes + (main + o_t)[None, :]
        tl.store(out, v.to(p_codes.dtype.element_ty), mask=m_t)


def allocate(packed: Packed, container: torch.dtype, *, appended: bool = False) -> Unpacked:
    """Allocate what :func:`launch` returns."""
    n, k = len(packed.qweight), 2 * packed.qweight.shape[1]
    new = packed.qweight.new_empty
    if not appended:
        return Unpacked(new((n, padded(k)), dtype=container), None)
    columns = columns_with_appended(k, packed.rank, packed.bias is not None)
    return Unpacked(new((n, columns), dtype=container), new((1, n), dtype=torch.float32))


def launch(
    packed: Packed,
    container: torch.dtype,
    *,
    element: Element = "int4",
    appended: bool = False,
    out: Unpacked | None = None,
    blocks_per_program: int = 128,
) -> Unpacked:
    """Unpack as in ``reference.py``; with ``appended`` columns also ``wscale`` in float32 [1, N].

    K must be a multiple of 8; ``out`` comes from :func:`allocate`.
    """
    out = out or allocate(packed, container, appended=appended)
    q, wp, bias = packed.qweight, packed.wp, packed.bias
    n, k, columns = len(q), 2 * q.shape[1], out.weights.shape[1]
    if not appended:
        wp = bias = None
    made = config(
        k, columns, 0 if wp is None else wp.shape[1], bias=bias is not None,
        fp8=container != torch.int8, lm4=element == "lm4", blocks=blocks_per_program,
    )  # fmt: skip
    blocks = padded(k) // BLOCK
    n_main = triton.cdiv(n * blocks, blocks_per_program)
    # Of absent tensors nothing is read.
    pointers = (q if t is None else t for t in (packed.wscale, wp, bias, out.scale))
    made.launch(
        (n_main + (triton.cdiv(n, ROWS) if appended else 0),),
        q.view(torch.int32), out.weights.view(torch.int32), out.weights, *pointers,
        n, blocks, k // 8, columns // 4, columns, padded(k), n_main, n * blocks, BIAS_COEFFICIENT,
    )  # fmt: skip
    return out


def config(
    width: int, columns: int, rank: int, *, bias: bool, fp8: bool, lm4: bool, blocks: int = 128
) -> Config:
    """Configure rows of ``width`` codes that leave as ``columns``, for ``rank`` and bias."""
    constants = {
        "R": rank, "RT": max(1, appended_part(rank, bias)),
        "T": triton.next_power_of_2(max(16, columns - padded(width))), "FP8": fp8, "LM4": lm4,
        "BIAS": bias, "RAGGED": width % BLOCK != 0, "BB": blocks, "BN": ROWS,
    }  # fmt: skip
    return Config(kernel=unpack, constants=constants)


def builds() -> list[Build]:
    """List FP8 with and without (rank None) appended columns and INT8, whole and ragged rows, in
    both elements."""
    types = {"p_q": "*i32", "p_out": "*i32", "p_codes": "*fp8e4nv", "p_scale": "*bf16"}
    types |= {"p_wp": "*bf16", "p_bias": "*bf16", "p_scale32": "*fp32", "one": "fp32"}
    found = []
    for lm4, fp8, rank, width in (
        (False, True, 64, 3072), (False, True, 64, 2272), (False, True, 0, 3072),
        (False, True, None, 3072), (False, False, None, 3072),
        (True, True, 64, 3072), (True, True, 64, 2272), (True, False, None, 3072),
    ):  # fmt: skip
        columns = padded(width) if rank is None else columns_with_appended(width, rank, True)
        made = config(width, columns, rank or 0, bias=rank is not None, fp8=fp8, lm4=lm4)
        kinds = types if fp8 else types | {"p_codes": "*i8"}
        element, container = "lm4" if lm4 else "int4", "fp8" if fp8 else "int8"
        found.append(
            Build.of(
                made, kinds, aligned=("words", "row_words", "row_bytes", "main"),
                name=f"unpack_w4-{element}-{container}-r{rank}-k{width}",
                chips=FP8_CHIPS if fp8 else CHIPS, tensor_core=False,
            )
        )  # fmt: skip
    return found
