"""Specification of ``w4a16_linear`` (docs/method.md M7).

Letters: M rows, N outputs, K inputs, G groups.
"""

from torch import Tensor

from ..pack_int4 import unpack_int4
from ..quantize_weight import dequantize_weight


def w4a16_linear(
    z_MK: Tensor, qweight_NK2: Tensor, wscale_NG: Tensor, bias_N: Tensor | None
) -> Tensor:
    """y = z (s_w q_w)ᵀ + bias, accumulated in float32.

    z_MK         floating, [M, K]
    qweight_NK2  uint8, [N, K // 2], layout L1
    wscale_NG    bf16 weight scales, [N, 1] or one per group
    bias_N       [N] floating or None
    returns      float32, [M, N]
    """
    y_MN = z_MK.float() @ dequantize_weight(unpack_int4(qweight_NK2), wscale_NG).mT
    return y_MN if bias_N is None else y_MN + bias_N.float()
