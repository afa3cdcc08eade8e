"""Triton ``gated_residual``: three numbers come, one goes, or two with the next norm; bound by
memory.

Letters: B images, T tokens, D channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from ..build import Config
from ..chip import capability, chained
from ..transform_quantize.configs import warps_of_row
from ..transform_quantize.projection import modulated_row

ROWS, COLUMNS = 4, 1024
"""Of one program."""


@triton.jit
def gate_and_add(
    p_x, p_gate, p_y, p_out, T, D, blocks, image_x, stride_x, image_y, stride_y, stride_gate,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Compute BM tokens of an image, BD channels; out [B, T, D] lies row after row."""
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
    """Run :func:`.reference.gated_residual` on bf16 and fp16, rounded once; rows may lie apart."""
    x, gate, y = (t if t.stride(-1) == 1 else t.contiguous() for t in (x_BTD, gate_BD, y_BTD))
    images, tokens, d = x.shape
    out = torch.empty((images, tokens, d), dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(tokens, ROWS)
    with torch.cuda.device_of(x):
        add_config().launch(
            (images * blocks * triton.cdiv(d, COLUMNS),),
            x, gate, y, out, tokens, d, blocks, x.stride(0), x.stride(1), y.stride(0), y.stride(1),
            gate.stride(0),
        )  # fmt: skip
    return out


@triton.jit
def add_and_normalize(
    p_x, p_gate, p_y, p_out, p_scale, p_shift, p_normed, p_squares, T, D,
    image_x, stride_x, image_y, stride_y, stride_gate, stride_scale, eps,
    BD: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """Compute a row of x + gate * y, of its modulated LayerNorm, and the sum of that's squares.

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
    """Return x + gate * y [B, T, D], its modulated LayerNorm [1, B T, D], and the sums of that's
    squares, float32 [1, B T]."""
    tensors = x_BTD, gate_BD, y_BTD, scale_BD, shift_BD
    x, gate, y, scale, shift = (t if t.stride(-1) == 1 else t.contiguous() for t in tensors)
    if scale.stride(0) != shift.stride(0):
        scale, shift = scale.contiguous(), shift.contiguous()
    images, tokens, d = x.shape
    out = torch.empty((images, tokens, d), dtype=x.dtype, device=x.device)
    normed = x.new_empty((1, images * tokens, d))
    squares = x.new_empty((1, images * tokens), dtype=torch.float32)
    with torch.cuda.device_of(x):
        norm_config(d, capability(x.device)).launch(
            (images * tokens,),
            x, gate, y, out, scale, shift, normed, squares, tokens, d, x.stride(0), x.stride(1),
            y.stride(0), y.stride(1), gate.stride(0), scale.stride(0), eps,
        )  # fmt: skip
    return out, normed, squares


def add_config() -> Config:
    return Config(kernel=gate_and_add, constants={"BM": ROWS, "BD": COLUMNS})


def norm_config(channels: int, chip: int | None) -> Config:
    width = triton.next_power_of_2(channels)
    return Config(
        kernel=add_and_normalize,
        constants={"BD": width, "CHAIN": chained(chip)},
        warps=warps_of_row(width),
        early=chained(chip),
    )
