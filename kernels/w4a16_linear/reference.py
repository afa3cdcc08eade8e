"""Specification of ``w4a16_linear`` (docs/method.md M7).

Letters: M rows, N outputs, K inputs, G groups.
"""

from torch import Tensor

from ..formats.quantize_weight import dequantize_weight, unpack_weight
from ..formats.weight import Element


def w4a16_linear(
    z_MK: Tensor,
    qweight_NK2: Tensor,
    wscale_NG: Tensor,
    bias_N: Tensor | None,
    wglobal_1: Tensor | None = None,
    element: Element = "int4",
) -> Tensor:
    """Compute y = z (s_w q_w)ᵀ + bias, accumulated in float32.

    z_MK         floating, [M, K]
    qweight_NK2  uint8, [N, K // 2], layout L1, or L2 where ``wscale_NG`` are bytes
    wscale_NG    bf16 weight scales, [N, 1] or one per group; or bytes (``weight_steps``)
    bias_N       [N] floating or None
    wglobal_1    float32, [1], NVFP4's global scale, or None
    element      ``int4`` or ``lm4``; bytes mean ``e2m1``
    returns      float32, [M, N]
    """
    weight_NK = dequantize_weight(*unpack_weight(qweight_NK2, wscale_NG, wglobal_1, element))
    y_MN = z_MK.float() @ weight_NK.mT
    return y_MN if bias_N is None else y_MN + bias_N.float()
