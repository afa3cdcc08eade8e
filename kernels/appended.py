"""The low-rank branch and the bias as further columns of the 8-bit product (docs/kernels.md).

c (W P)ᵀ + bias joins the main branch's accumulator as FP8 columns. A bfloat16 value is high + low,
two E4M3 numbers of four significant bits each, so three column blocks hold the product but for low
low: (high, low, high) of c against (high, high, low) of W P. The bias is one more direction, whose
coefficient is constant.
"""

import torch
from torch import Tensor

from .permuted import padded, to_permuted

TINY = 1e-30
"""Rows and groups no larger than this are zero: 7 / amax would overflow for denormals."""

LIMIT = 512.0
"""Largest |W P| / weight scale that the columns hold; ``gptq`` keeps scales large enough."""

BIAS_COEFFICIENT = 4.0
"""c of the bias's direction: |bias| / weight scale may be that much larger, up to BIAS_LIMIT."""

BIAS_LIMIT = LIMIT * BIAS_COEFFICIENT


def appended_part(rank: int, bias: bool) -> int:
    """Return the columns of each of the three appended blocks: a direction each, in whole 16s."""
    return -(-(rank + bias) // 16) * 16


def columns_with_appended(width: int, rank: int, bias: bool) -> int:
    """Return columns of codes and appended ones, in whole 128s, which matrix units like best."""
    return -(-(padded(width) + 3 * appended_part(rank, bias)) // 128) * 128


def split_fp8(v: Tensor) -> tuple[Tensor, Tensor]:
    """Split v = high + low in float8_e4m3fn: exact for bf16 of magnitude 2^-2 ... 448."""
    high = v.to(torch.float8_e4m3fn)
    return high, (v.float() - high.float()).to(torch.float8_e4m3fn)


def with_appended(
    codes_MK: Tensor,
    scale_M1: Tensor,
    c_MR: Tensor | None,
    *,
    bits_below: int,
    bias: bool,
    counted: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return codes of ``quantize_rows`` in FP8, R1 order, c behind them: as the kernel writes.

    codes_MK    int8 or float8_e4m3fn, [M, K], one scale per row
    bits_below  the powers of two that the codes carry below a step (``ActFormat.levels``)
    scale_M1    float32, [M, 1]
    c_MR        floating, [M, R], or None at rank 0
    counted     weight codes that are worth a scale: 1 of INT4, 16 of LM4
    returns     float8_e4m3fn [M, columns_with_appended(K, R, bias)] and their scale, float32
                [M, 1], for a product with what ``unpack_w4`` makes of the weights

    A step is worth 2^(6 - k) in FP8: k >= 0 halves a row's codes, exactly down to 2^-9, as often as
    its largest coefficient needs to stay within FP8's 448. LM4's codes are 16 times INT4's, so that
    coefficients, too, are 16 times as large beside the codes.
    """
    m = len(codes_MK)
    step_M1 = scale_M1 * 2.0**bits_below
    directions = [] if c_MR is None else [c_MR.float()]
    directions += [torch.full_like(scale_M1, BIAS_COEFFICIENT)] if bias else []
    v_Mr = torch.cat([scale_M1.new_zeros(m, 0), *directions], 1)
    absmax_M1 = v_Mr.abs().amax(1, keepdim=True) if v_Mr.shape[1] else torch.zeros_like(scale_M1)
    step_M1 = torch.where(step_M1 > TINY / 7, step_M1, absmax_M1.clamp_min(TINY) / 256)
    mantissa, exponent = torch.frexp(absmax_M1 / (step_M1 * (1792 / counted)))
    k_M1 = torch.where(mantissa > 0.5, exponent, exponent - 1).clamp(0, 60)
    unit_M1 = torch.ldexp(torch.ones_like(step_M1), 6 - bits_below - k_M1)
    out_scale_M1 = torch.ldexp(step_M1, k_M1 + 3) / counted
    rank = 0 if c_MR is None else c_MR.shape[1]
    v_Mr = torch.nn.functional.pad(
        v_Mr * (2 / out_scale_M1), (0, appended_part(rank, bias) - v_Mr.shape[1])
    )
    high, low = split_fp8(v_Mr)
    main = (to_permuted(codes_MK.float()) * unit_M1).to(torch.float8_e4m3fn)
    columns = columns_with_appended(codes_MK.shape[1], rank, bias)
    out = torch.zeros(m, columns, dtype=torch.uint8, device=codes_MK.device)
    parts = torch.cat([t.view(torch.uint8) for t in (main, high, low, high)], 1)
    out[:, : parts.shape[1]] = parts
    return out.view(torch.float8_e4m3fn), out_scale_M1
