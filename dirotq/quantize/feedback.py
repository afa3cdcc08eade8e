"""What the 4-bit codes got wrong, as far as the protected branch can make up for it.

Letters: N outputs, D channels, K main-branch width, R protected directions.
"""

import torch
from torch import Tensor

from dirotq.kernels.transform_quantize import transform
from dirotq.quantize.rotation import Rotation


def feedback(rotation: Rotation, s_DD: Tensor, error_NK: Tensor) -> tuple[Tensor, float]:
    """The change of V that takes most of the rounding error back (docs/method.md Eq. 13).

    s_DD      second moment of x, [D, D]
    error_NK  W_z minus its codes times scales, float [N, K]
    returns   ΔV = E E[z cᵀ] E[c cᵀ]⁻¹, float64 [N, R], and the share of E|z Eᵀ|² that it takes back

    Where P holds exact eigenvectors and leaves x, z and c are uncorrelated and ΔV is zero.
    """
    assert rotation.basis_DR is not None
    p_DR = rotation.basis_DR.double()
    sp_DR = s_DD.double() @ p_DR
    cross_RK = _through(rotation, sp_DR.mT.contiguous())
    own_RR = p_DR.mT @ sp_DR
    own_RR.diagonal().add_(1e-6 * own_RR.diagonal().mean())
    wanted_NR = error_NK.double() @ cross_RK.mT
    change_NR = torch.linalg.solve(own_RR, wanted_NR.mT).mT
    error = error_NK.double()
    total = ((error @ rotation.moments(s_DD)) * error).sum().clamp_min(1e-300)
    return change_NR, float((change_NR * wanted_NR).sum() / total)


def _through(rotation: Rotation, rows_RD: Tensor) -> Tensor:
    """The linear map x -> z, applied to rows in float64."""
    p, t = rotation.basis_DR, rotation.rotation_DK
    return transform(
        rows_RD,
        None if p is None else p.double(),
        None if t is None else t.double(),
        rotation.spec,
        rotation.smooth_D,
    )[0]
