"""Specification of ``unpack_w4`` (docs/kernels.md).

Letters: N outputs, K main-branch inputs, R low-rank directions.
"""

import torch
from torch import Tensor

from ..appended import BIAS_COEFFICIENT, appended_part, columns_with_appended, split_fp8
from ..formats.quantize_weight import unpack_codes
from ..formats.weight import Element
from ..permuted import to_permuted

FP8_UNIT = 2.0**-9
"""An FP8 code stands for q 2^-9. Sign and magnitude of INT4's q are that E4M3 subnormal's bits;
LM4's q, which count units, are exact there too."""


def unpack_w4(
    qweight_NK2: Tensor,
    container: torch.dtype,
    wscale_N1: Tensor | None = None,
    wp_NR: Tensor | None = None,
    bias_N: Tensor | None = None,
    element: Element = "int4",
) -> Tensor:
    """Unpack layout L1 to 8-bit columns in R1 order, with appended columns behind them.

    qweight_NK2  uint8, [N, K // 2], layout L1
    container    int8 (q itself, LM4's in units) or float8_e4m3fn (q 2^-9)
    wscale_N1    bf16, [N, 1]; float8 only: asks for appended columns (kernels/appended.py) of
                 wp / (2 wscale) and bias / (2 BIAS_COEFFICIENT wscale)
    wp_NR        W P, bf16 [N, R], or None at rank 0
    bias_N       bf16, [N], or None
    element      ``int4`` or ``lm4``
    returns      [N, padded(K)], or [N, columns_with_appended(K, R, bias)], of ``container``
    """
    q = to_permuted(unpack_codes(qweight_NK2, element))
    if container == torch.int8:
        return q
    main = (q.float() * FP8_UNIT).to(torch.float8_e4m3fn)
    if wscale_N1 is None:
        return main
    n, s = len(q), wscale_N1.float()
    directions = [] if wp_NR is None else [wp_NR.float()]
    directions += [] if bias_N is None else [bias_N.float()[:, None] / BIAS_COEFFICIENT]
    v = torch.cat([s.new_zeros(n, 0), *directions], 1)
    v = torch.where(s > 0, v / (2 * s), 0.0)
    rank, bias = v.shape[1] - (bias_N is not None), bias_N is not None
    high, low = split_fp8(torch.nn.functional.pad(v, (0, appended_part(rank, bias) - v.shape[1])))
    columns = columns_with_appended(2 * qweight_NK2.shape[1], rank, bias)
    out = torch.zeros(n, columns, dtype=torch.uint8, device=s.device)
    parts = torch.cat([t.view(torch.uint8) for t in (main, high, high, low)], 1)
    out[:, : parts.shape[1]] = parts
    return out.view(container)
