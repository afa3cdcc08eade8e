"""Triton ``sweep``: a program rounds the columns of a few rows, all of it in registers.

Letters: N outputs, B columns of the block.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import Config
from ..formats.lm4 import BETWEEN, CODES
from ..formats.quantize_weight import QMAX
from ..formats.weight import Element

LIMIT = tl.constexpr(float(QMAX))
ROUNDER = tl.constexpr(1.5 * 2**23)
"""Added to a small float32 and taken off again, it leaves the nearest integer, ties to even."""
ROWS, COLUMNS, WARPS = 16, 128, 4
FIRST = tl.constexpr(float(CODES[0]))
RISES = tl.constexpr(len(BETWEEN))
AFTER = tl.constexpr(BETWEEN)
"""Magnitudes after which LM4's codes rise ..."""
BY = tl.constexpr(tuple(float(b - a) for a, b in itertools.pairwise(CODES)))
"""... and by how much."""


@triton.jit
def nearest(v, LM4: tl.constexpr):
    """Round v, in steps, to the nearest code: of INT4 to even, of LM4 to the smaller magnitude."""
    if not LM4:
        return (tl.minimum(tl.maximum(v, -LIMIT), LIMIT) + ROUNDER) - ROUNDER
    magnitude = tl.full(v.shape, FIRST, tl.float32)
    for i in tl.static_range(RISES):
        magnitude += tl.where(tl.abs(v) > AFTER[i], BY[i], 0.0)
    return tl.where(v < 0, -magnitude, magnitude)


@triton.jit
def sweep(
    p_w, p_target, p_step, p_turned, p_codes, p_error, N, B,
    w_stride, target_stride, step_stride, step_next,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LM4: tl.constexpr,
):  # fmt: skip
    """Compute codes and errors of ROWS rows.

    p_turned   the triangle turned on its side, [B, B]: column k of it stands in one row
    step_next  from one column's steps to the next one's; 0: a row has one step
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    m_row, m_column = row < N, column < B
    mask = m_row[:, None] & m_column[None, :]
    row = row.to(tl.int64)
    w = tl.load(p_w + row[:, None] * w_stride + column[None, :], mask=mask, other=0.0)
    # Columns that have had their turn hold their error, the others their target. Times a column
    # of the unit triangle: its target, plus what the errors before it add, plus nothing.
    state = tl.load(
        p_target + row[:, None] * target_stride + column[None, :], mask=mask, other=0.0
    )  # [ROWS, COLUMNS]
    codes = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in range(0, B):
        f = tl.load(p_turned + k * B + column, mask=m_column, other=0.0)  # [COLUMNS]
        step = tl.load(p_step + row * step_stride + k * step_next, mask=m_row, other=0.0)
        wanted = tl.sum(state * f[None, :], axis=1)  # [ROWS]
        q = tl.where(step > 0, tl.div_rn(wanted, tl.where(step > 0, step, 1.0)), 0.0)
        q = nearest(q, LM4)
        here = (column == k)[None, :]
        codes = tl.where(here, q[:, None], codes)
        state = tl.where(here, w - (q * step)[:, None], state)
    at = row[:, None] * B + column[None, :]
    tl.store(p_codes + at, codes.to(tl.int8), mask=mask)
    tl.store(p_error + at, state, mask=mask)


def launch(
    w_NB: Tensor,
    target_NB: Tensor,
    step_NB: Tensor,
    f_BB: Tensor,
    *,
    element: Element = "int4",
) -> tuple[Tensor, Tensor]:
    """Run :func:`.reference.sweep` of ``int4`` or ``lm4`` on at most COLUMNS columns in float32.

    Raises ValueError for more columns than that.
    """
    (n, b), by_row = w_NB.shape, step_NB.shape[1] == 1
    if b > COLUMNS:
        raise ValueError(f"a block of {b} columns is wider than the {COLUMNS} the kernel holds")
    rows = [t if t.stride(1) == 1 else t.contiguous() for t in (w_NB, target_NB)]
    codes_NB = w_NB.new_empty((n, b), dtype=torch.int8)
    error_NB = w_NB.new_empty((n, b))
    with torch.cuda.device_of(w_NB):
        config(element).launch(
            (triton.cdiv(n, ROWS),),
            *rows, step_NB, f_BB.mT.contiguous(), codes_NB, error_NB, n, b,
            *(t.stride(0) for t in (*rows, step_NB)), 0 if by_row else step_NB.stride(1),
        )  # fmt: skip
    return codes_NB, error_NB


def config(element: Element = "int4") -> Config:
    constants = {"ROWS": ROWS, "COLUMNS": COLUMNS, "LM4": element == "lm4"}
    return Config(kernel=sweep, constants=constants, warps=WARPS)
