"""Triton: weights, scales and bias as Humming's products read them, per call and in scratch.

Nothing is kept twice, and files and state dicts know one layout. Bound by memory: half a byte read
and half a byte written per weight. Letters: N outputs, K main-branch inputs.
"""

import math

import torch
import triton
import triton.language as tl

from ..buffers import Packed, Repacked
from ..build import Build, Config
from ..permuted import BLOCK

ROWS, BLOCKS = 64, 4
"""Outputs of a program, and 64-column blocks at most."""

OUTPUTS = 1024
"""Of a program that permutes scales and bias."""

LOCKS = 2048
"""Zeroed int32 by which programs of one output tile wait for each other; as many as Humming's own
layers have. Each call has its own: linears may run beside each other."""


@triton.jit
def _eight(nibbles):
    """Make eight nibbles, one per byte of an int64, one int32."""
    pairs = (nibbles | (nibbles >> 4)) & 0x00FF00FF00FF00FF
    fours = (pairs | (pairs >> 8)) & 0x0000FFFF0000FFFF
    return (fours | (fours >> 16)).to(tl.int32)


@triton.jit
def repack(
    p_q, p_out, p_scale, p_bias, p_scale_out, p_bias_out, p_locks, N, blocks, n_col, n_main,
    BIAS: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, BO: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Repack BN outputs of BB 64-column blocks (programs below ``n_main``), or permute the scales
    and biases of BO outputs; the first of those zeroes the L locks.

    p_q     int64, [N, blocks, 4]: four times eight bytes, layout L1
    p_out   int32, [2 * blocks, N, 4]: low nibbles are R1's first 32 columns, high ones the others
    n_col   programs side by side
    """
    pid = tl.program_id(0)
    if pid < n_main:
        o_b = pid % n_col * BB + tl.arange(0, BB)[:, None, None]
        o_n = pid // n_col * BN + tl.arange(0, BN)[None, :, None]
        o_w = tl.arange(0, 4)[None, None, :]
        source, target = (o_n * blocks + o_b) * 4 + o_w, (o_b * 2 * N + o_n) * 4 + o_w
        packed = tl.load(p_q + source)
        tl.store(p_out + target, _eight(packed & 0x0F0F0F0F0F0F0F0F))
        tl.store(p_out + target + 4 * N, _eight((packed >> 4) & 0x0F0F0F0F0F0F0F0F))
    else:
        place = (pid - n_main) * BO + tl.arange(0, BO)
        inside = place < N
        output = place // 32 * 32 + place % 8 // 2 * 8 + place % 32 // 8 * 2 + place % 2
        tl.store(p_scale_out + place, tl.load(p_scale + output, mask=inside), mask=inside)
        if BIAS:
            tl.store(p_bias_out + place, tl.load(p_bias + output, mask=inside), mask=inside)
        if pid == n_main:
            tl.store(p_locks + tl.arange(0, L), tl.zeros((L,), dtype=tl.int32))


def allocate(packed: Packed) -> Repacked:
    """Allocate what :func:`launch` fills."""
    q, new, bias = packed.qweight, packed.qweight.new_empty, packed.bias
    return Repacked(
        new((len(q), q.shape[1] // 4), dtype=torch.int32),
        new((1, len(q)), dtype=packed.wscale.dtype),
        None if bias is None else new((len(q),), dtype=bias.dtype),
        new((LOCKS,), dtype=torch.int32),
    )


def launch(packed: Packed, out: Repacked | None = None) -> Repacked:
    """Repack as in ``reference.py``; N and K are multiples of 64, ``out`` is :func:`allocate`'s."""
    out = out or allocate(packed)
    q, bias = packed.qweight, packed.bias
    n, blocks = len(q), 2 * q.shape[1] // BLOCK
    made = config(blocks, bias=bias is not None)
    n_col = blocks // made.constants["BB"]
    n_main = n // ROWS * n_col
    made.launch(
        (n_main + triton.cdiv(n, OUTPUTS),),
        q.view(torch.int64), out.weights, packed.wscale, q if bias is None else bias, out.scale,
        q if out.bias is None else out.bias, out.locks, n, blocks, n_col, n_main,
    )  # fmt: skip
    return out


def config(blocks: int, *, bias: bool) -> Config:
    """Configure rows of so many 64-column blocks."""
    constants = {
        "BIAS": bias, "BN": ROWS, "BB": math.gcd(blocks, BLOCKS), "BO": OUTPUTS, "L": LOCKS,
    }  # fmt: skip
    return Config(kernel=repack, constants=constants)


def builds() -> list[Build]:
    """List rows of four, two and one block at a time, with and without a bias."""
    types = {"p_q": "*i64", "p_out": "*i32", "p_locks": "*i32"}
    types |= dict.fromkeys(("p_scale", "p_bias", "p_scale_out", "p_bias_out"), "*bf16")
    return [
        Build.of(
            config(width // BLOCK, bias=bias),
            types if bias else types | {"p_bias": "*u8", "p_bias_out": "*u8"},
            aligned=("N",), name=f"humming_linear-k{width}{'-bias' if bias else ''}",
            tensor_core=False,
        )
        for width in (3072, 1152, 1088) for bias in (True, False)
    ]  # fmt: skip
