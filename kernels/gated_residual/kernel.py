"""Triton ``gated_residual``: three numbers come, one goes, or two with the next norm; bound by
memory.

Letters: B images, T tokens, D channels.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from ..build import Build
from ..chip import chained
from ..transform_quantize.projection import modulated_row
from ..transform_quantize.shapes import warps_of_row

ROWS, COLUMNS = 4, 1024
"""Of one program."""


@triton.jit
def gate_and_add(
    p_x, p_gate, p_y, p_out, T, D, blocks, image_x, stride_x, image_y, stride_y, stride_gate,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """BM tokens of an image, BD channels; out [B, T, D] lies row after row."""
    n_col = tl.cdiv(D, BD)
    pid = tl.program_id(0)
    index = pid // n_col
    image = (index // blocks).to(tl.int64)
    o_t = (index % blocks) * BM + tl.arange(0, BM)
    o_d = (pid % n_col) * BD + tl.arange(0, BD)
    m_d = o_d < D
    mask = (o_t < T)[:, None] & m_d[None, :]
    t = o_t.to(tl.int64)[:, None]
    x = tl.load(p_x + image * image_x + t * stride_x + o_d[None, :], mask=mask).to(tl.float32)
    y = tl.load(p_y + image * image_y + t * stride_y + o_d[None, :], mask=mask).to(tl.float32)
    gate = tl.load(p_gate + image * stride_gate + o_d, mask=m_d).to(tl.float32)
    out = x + gate[None, :] * y
    at = p_out + (image * T + t) * D + o_d[None, :]
    tl.store(at, out.to(p_out.dtype.element_ty), mask=mask)


def launch(x_BTD: Tensor, gate_BD: Tensor, y_BTD: Tensor) -> Tensor:
    """:func:`.reference.gated_residual` for bf16 and fp16, rounded once; any strides but of D."""
    x, gate, y = (t if t.stride(-1) == 1 else t.contiguous() for t in (x_BTD, gate_BD, y_BTD))
    images, tokens, d = x.shape
    out = torch.empty((images, tokens, d), dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(tokens, ROWS)
    with torch.cuda.device_of(x):
        gate_and_add[(images * blocks * triton.cdiv(d, COLUMNS),)](
            x, gate, y, out, tokens, d, blocks, x.stride(0), x.stride(1), y.stride(0), y.stride(1),
            gate.stride(0),
            BM=ROWS, BD=COLUMNS, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def add_and_normalize(
    p_x, p_gate, p_y, p_out, p_scale, p_shift, p_normed, p_squares, T, D,
    image_x, stride_x, image_y, stride_y, stride_gate, stride_scale, eps,
    BD: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """One row of x + gate * y, of its modulated LayerNorm, and the sum of that's squares.

    The norm is of what was rounded and stored, as if it had been read again.
    """
    row = tl.program_id(0).to(tl.int64)
    image, t = row // T, row % T
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    if CHAIN:
        gdc_wait()
    x = tl.load(p_x + image * image_x + t * stride_x + o_d, mask=m_d, other=0.0).to(tl.float32)
    y = tl.load(p_y + image * image_y + t * stride_y + o_d, mask=m_d, other=0.0).to(tl.float32)
    gate = tl.load(p_gate + image * stride_gate + o_d, mask=m_d, other=0.0).to(tl.float32)
    x = (x + gate * y).to(p_out.dtype.element_ty)
    tl.store(p_out + row * D + o_d, x, mask=m_d)
    at = image * stride_scale
    y = modulated_row(x.to(tl.float32), p_scale + at, p_shift + at, o_d, D, eps)
    y = y.to(p_normed.dtype.element_ty)
    tl.store(p_normed + row * D + o_d, y, mask=m_d)
    y = tl.where(m_d, y.to(tl.float32), 0.0)
    tl.store(p_squares + row, tl.sum(y * y))


def launch_with_norm(
    x_BTD: Tensor, gate_BD: Tensor, y_BTD: Tensor, scale_BD: Tensor, shift_BD: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x + gate * y [B, T, D], its modulated LayerNorm [1, B T, D], and the sums of that's squares,
    float32 [1, B T]."""
    tensors = x_BTD, gate_BD, y_BTD, scale_BD, shift_BD
    x, gate, y, scale, shift = (t if t.stride(-1) == 1 else t.contiguous() for t in tensors)
    if scale.stride(0) != shift.stride(0):
        scale, shift = scale.contiguous(), shift.contiguous()
    images, tokens, d = x.shape
    out = torch.empty((images, tokens, d), dtype=x.dtype, device=x.device)
    normed = x.new_empty((1, images * tokens, d))
    squares = x.new_empty((1, images * tokens), dtype=torch.float32)
    width = triton.next_power_of_2(d)
    with torch.cuda.device_of(x):
        add_and_normalize[(images * tokens,)](
            x, gate, y, out, scale, shift, normed, squares, tokens, d, x.stride(0), x.stride(1),
            y.stride(0), y.stride(1), gate.stride(0), scale.stride(0), eps,
            BD=width, CHAIN=chained(x), num_warps=warps_of_row(width), launch_pdl=chained(x),
        )  # fmt: skip
    return out, normed, squares


def builds() -> list[Build]:
    """bf16 and fp16."""
    return [
        build
        for dtype in ("bf16", "fp16")
        for build in (
            _build(dtype, gate_and_add, {"BM": ROWS, "BD": COLUMNS}, 4),
            _build(dtype, add_and_normalize, {"BD": 4096, "CHAIN": False}, warps_of_row(4096)),
        )
    ]


def _build(dtype: str, kernel: Any, constants: dict[str, Any], warps: int) -> Build:
    names = [n for n in kernel.arg_names if n not in constants]
    types = {n: f"*{dtype}" if n.startswith("p_") else "i32" for n in names}
    types |= {n: t for n, t in (("p_squares", "*fp32"), ("eps", "fp32")) if n in names}
    return Build(
        name=f"{kernel.__name__}-{dtype}", kernel=kernel, constants=constants, signature=types,
        warps=warps, stages=1, tensor_core=False,
        aligned=tuple(n for n in names if n not in ("T", "blocks", "eps")),
    )  # fmt: skip
