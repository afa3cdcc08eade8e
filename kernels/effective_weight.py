"""The 16-bit weight that a packed linear stands for: its map, but for the rounding of activations.

Letters: N outputs, D channels, K main-branch width, R low-rank directions.
"""

import torch
from torch import Tensor

from .buffers import Packed
from .formats.protected import dequantize_protected
from .formats.quantize_weight import dequantize_weight, unpack_weight
from .formats.spec import QuantSpec
from .transform_quantize.reference import transform


def effective_weight(packed: Packed, spec: QuantSpec) -> Tensor:
    """Return W, float32 [N, D]: with activations that are not rounded, y = x Wᵀ + bias.

    The transform and the branch are linear maps of x, so they are the rows of what they make of
    the identity (docs/method.md M1 to M3).
    """
    eye_DD = torch.eye(spec.in_features, device=packed.qweight.device)
    z_DK, c_DR = transform(eye_DD, packed.basis, packed.rotation, spec, packed.smooth)
    steps = packed.wscale, packed.wglobal, spec.weights.element
    weight_ND = dequantize_weight(*unpack_weight(packed.qweight, *steps)) @ z_DK.mT
    if c_DR is None or packed.wp is None:
        return weight_ND
    wp_NR = packed.wp.float()
    if packed.wpscale is not None:
        wp_NR = dequantize_protected(packed.wp, packed.wpscale)
    return weight_ND.addmm_(wp_NR, c_DR.mT)
