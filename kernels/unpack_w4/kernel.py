"""Triton ``unpack_w4``: eight nibbles at a time, in 32-bit words; bound by memory.

Letters: N outputs, K main-branch inputs, R protected directions (RT: rounded up to 16).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import CHIPS, FP8_CHIPS, Build
from ..planar import BLOCK, padded
from ..tail import BIAS_COEFFICIENT, columns_with_tail, tail_part
from ..transform_quantize.scales import e4m3

WORDS = tl.constexpr(8)
"""int32 words of one 64-column block in layout L1."""


@triton.jit
def _bytes(nibbles, FP8: tl.constexpr):
    """Four two's complement nibbles, one per byte, as four int8 or four E4M3 subnormals."""
    sign = (nibbles >> 3) & 0x01010101
    if FP8:
        magnitude = (nibbles ^ ((sign << 4) - sign)) + sign
        return magnitude | (sign << 7)
    return nibbles | ((sign << 8) - (sign << 4))


@triton.jit
def unpack(
    p_q, p_out, p_tail, p_scale, p_wp, p_bias, p_scale32, N, blocks, words, row_words, row_bytes,
    tail, n_main, n_blocks, one,
    R: tl.constexpr, RT: tl.constexpr, T: tl.constexpr, FP8: tl.constexpr, BIAS: tl.constexpr,
    RAGGED: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Programs below ``n_main`` unpack BB 64-column blocks each; the others write BN rows of tail.

    blocks  64-column blocks of a row; words: int32 words of a row of ``p_q``
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
        tl.store(p_out + target, _bytes(packed & 0x0F0F0F0F, FP8), mask=mask)
        tl.store(p_out + target + WORDS, _bytes((packed >> 4) & 0x0F0F0F0F, FP8), mask=mask)
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
        m_tail = m_n[:, None] & (tail + o_t < row_bytes)[None, :]
        out = p_tail + o_n.to(tl.int64)[:, None] * row_bytes + (tail + o_t)[None, :]
        tl.store(out, v.to(p_tail.dtype.element_ty), mask=m_tail)


def allocate(
    qweight_NK2: Tensor,
    container: torch.dtype,
    wscale_N1: Tensor | None = None,
    wp_NR: Tensor | None = None,
    bias_N: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Memory for what :func:`launch` returns."""
    n, k = len(qweight_NK2), 2 * qweight_NK2.shape[1]
    if wscale_N1 is None:
        return qweight_NK2.new_empty((n, padded(k)), dtype=container), None
    columns = columns_with_tail(k, 0 if wp_NR is None else wp_NR.shape[1], bias_N is not None)
    out = qweight_NK2.new_empty((n, columns), dtype=container)
    return out, qweight_NK2.new_empty((1, n), dtype=torch.float32)


def launch(
    qweight_NK2: Tensor,
    container: torch.dtype,
    wscale_N1: Tensor | None = None,
    wp_NR: Tensor | None = None,
    bias_N: Tensor | None = None,
    *,
    out: tuple[Tensor, Tensor | None] | None = None,
    blocks_per_program: int = 128,
) -> tuple[Tensor, Tensor | None]:
    """:func:`.reference.unpack_w4`, and ``wscale_N1`` (if given) in float32 [1, N].

    K must be a multiple of 8 (:func:`fits`); ``out`` comes from :func:`allocate`.
    """
    weights, scale32 = out or allocate(qweight_NK2, container, wscale_N1, wp_NR, bias_N)
    n, k = len(qweight_NK2), 2 * qweight_NK2.shape[1]
    blocks, columns, tail = padded(k) // BLOCK, weights.shape[1], wscale_N1 is not None
    r, bias = 0 if wp_NR is None else wp_NR.shape[1], bias_N is not None
    n_main = triton.cdiv(n * blocks, blocks_per_program)
    bn = 16
    nothing = qweight_NK2
    unpack[(n_main + (triton.cdiv(n, bn) if tail else 0),)](
        qweight_NK2.view(torch.int32), weights.view(torch.int32), weights,
        nothing if wscale_N1 is None else wscale_N1, nothing if wp_NR is None else wp_NR,
        nothing if bias_N is None else bias_N, nothing if scale32 is None else scale32,
        n, blocks, k // 8, columns // 4, columns, padded(k), n_main, n * blocks, BIAS_COEFFICIENT,
        R=r, RT=max(1, tail_part(r, bias)), T=triton.next_power_of_2(max(16, columns - padded(k))),
        FP8=container != torch.int8, BIAS=bias, RAGGED=k % BLOCK != 0,
        BB=blocks_per_program, BN=bn, num_warps=4,
    )  # fmt: skip
    return weights, scale32


def fits(width: int) -> bool:
    """Whether rows of codes are whole 32-bit words."""
    return width % 8 == 0


def builds() -> list[Build]:
    """FP8 with and without a tail and INT8, whole and ragged rows."""
    types = {
        "p_q": "*i32",
        "p_out": "*i32",
        "p_tail": "*fp8e4nv",
        "p_scale": "*bf16",
        "one": "fp32",
    }
    types |= {"p_wp": "*bf16", "p_bias": "*bf16", "p_scale32": "*fp32"}
    found = []
    for fp8, rank, ragged in (
        (True, 64, False),
        (True, 64, True),
        (True, 0, False),
        (False, 0, False),
    ):
        constants = {
            "R": rank, "RT": tail_part(rank, fp8), "T": 256 if rank else 16, "FP8": fp8,
            "BIAS": fp8, "RAGGED": ragged, "BB": 128, "BN": 16,
        }  # fmt: skip
        if not fp8:
            constants["RT"] = 1
        kinds = types if fp8 else types | {"p_tail": "*i8"}
        signature = {n: kinds.get(n, "i32") for n in unpack.arg_names if n not in constants}
        aligned = ("words", "row_words", "row_bytes", "tail")
        found.append(
            Build(
                name=f"unpack_w4-{'fp8' if fp8 else 'int8'}-r{rank}{'-ragged' if ragged else ''}",
                kernel=unpack, signature=signature, constants=constants, warps=4, stages=1,
                chips=FP8_CHIPS if fp8 else CHIPS, tensor_core=False,
                aligned=tuple(n for n in signature if n in aligned or n.startswith("p_")),
            )
        )  # fmt: skip
    return found
