"""Specification of ``w4a4_linear`` (docs/method.md M2).

Letters: M rows, N outputs, K main-branch width, R low-rank directions, G groups.
"""

from torch import Tensor

from ..formats.quantize_weight import dequantize_weight, unpack_weight
from ..formats.weight import Element
from ..transform_quantize.reference import dequantize_rows


def w4a4_linear(
    codes_MK: Tensor,
    scale_MG: Tensor,
    c_MR: Tensor | None,
    qweight_NK2: Tensor,
    wscale_NG: Tensor,
    wp_NR: Tensor | None,
    bias_N: Tensor | None,
    wglobal_1: Tensor | None = None,
    element: Element = "int4",
) -> Tensor:
    """Compute y = s_x s_w (q_x q_wᵀ) + c (WP)ᵀ + bias, accumulated in float32.

    codes_MK     int8 activation codes (``transform_quantize``), [M, K]
    scale_MG     float32 activation scales, [M, 1] or one per group
    c_MR         low-rank coefficients, [M, R] floating; None at rank 0
    qweight_NK2  uint8, [N, K // 2], layout L1, or L2 where ``wscale_NG`` are bytes
    wscale_NG    bf16 weight scales, [N, 1] or one per group; or bytes (``weight_steps``)
    wp_NR        W P, [N, R] floating; None at rank 0
    bias_N       [N] floating or None
    wglobal_1    float32, [1], NVFP4's global scale, or None
    element      ``int4`` or ``lm4``; bytes mean ``e2m1``
    returns      float32, [M, N]

    With one scale per row and per output the main term is a product of integers below 2^24 for
    every K up to 18,000 (INT4), so float32 holds it exactly whatever the order of summation.
    """
    qw_NK, step_NG = unpack_weight(qweight_NK2, wscale_NG, wglobal_1, element)
    if scale_MG.shape[-1] == 1 and step_NG.shape[-1] == 1:
        acc_MN = codes_MK.float() @ qw_NK.float().mT
        y_MN = acc_MN * scale_MG * step_NG.float().mT
    else:
        y_MN = dequantize_rows(codes_MK, scale_MG) @ dequantize_weight(qw_NK, step_NG).mT
    if c_MR is not None:
        assert wp_NR is not None
        y_MN = y_MN + c_MR.float() @ wp_NR.float().mT
    return y_MN if bias_N is None else y_MN + bias_N.float()
