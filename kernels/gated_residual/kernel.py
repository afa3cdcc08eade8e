"""Triton ``gated_residual``: three numbers come, one goes; bound by memory.

Letters: B images, T tokens, D channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import Build

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


def builds() -> list[Build]:
    """bf16 and fp16."""
    constants = {"BM": ROWS, "BD": COLUMNS}
    names = [n for n in gate_and_add.arg_names if n not in constants]
    return [
        Build(
            name=f"gated_residual-{dtype}", kernel=gate_and_add, constants=constants,
            signature={n: f"*{dtype}" if n.startswith("p_") else "i32" for n in names},
            warps=4, stages=1, tensor_core=False,
            aligned=tuple(n for n in names if n not in ("T", "blocks")),
        )
        for dtype in ("bf16", "fp16")
    ]  # fmt: skip
