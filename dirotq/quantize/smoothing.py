"""Per-channel factors that shift difficulty from activations to weights (docs/method.md M3).

Letters: T sampled tokens, N outputs, D channels.
"""

from collections.abc import Iterable
from typing import TypeVar

from torch import Tensor

from dirotq.kernels.formats.protected import rounded_coefficients
from dirotq.kernels.transform_quantize import dequantize_rows, quantize_rows, transform
from dirotq.quantize.nearest import nearest
from dirotq.quantize.rotation import Rotation

T = TypeVar("T")
FLOOR = 1e-4
"""Channels are taken for no quieter than this share of the loudest one."""


def smoothing(absmax_D: Tensor, w_ND: Tensor, alpha: float) -> Tensor:
    """The factor of each channel, float32 [D], geometric mean 1 (SmoothQuant, arXiv 2211.10438).

    absmax_D  largest magnitudes of the activation, [D]
    alpha   0 smooths nothing but levels the weights, 1 moves all of the activation's range

    x is multiplied by m = max|W|^(1 - α) / max|X|^α, the weights are divided by it.
    """
    weight_D = _floored(w_ND.abs().amax(0).float())
    log_D = (1 - alpha) * weight_D.log() - alpha * _floored(absmax_D.float()).log()
    return (log_D - log_D.mean()).exp()


def simulated(rotation: Rotation, w_ND: Tensor, x_TD: Tensor, *, clip: bool) -> Tensor:
    """x Wᵀ with codes of nearest rounding on both sides: float32 [T, N].

    What a candidate is compared by before GPTQ: the packed linear's own arithmetic, without bias.
    """
    spec = rotation.spec
    main, kept = rotation.weights(w_ND)
    z, c = transform(x_TD, rotation.basis_DR, rotation.rotation_DK, spec, rotation.smooth_D)
    if spec.activations.bits < 16:
        z = dequantize_rows(*quantize_rows(z, spec))
    y = z @ nearest(main, spec, clip=clip, wp_NR=kept, bias_N=None).values().mT
    if c is None or kept is None:
        return y
    return y + (rounded_coefficients(c) if spec.branch.bits == 8 else c) @ kept.mT


def best(candidates: Iterable[tuple[Rotation, T]], w_ND: Tensor, x_TD: Tensor, *, clip: bool) -> T:
    """What comes with the rotation that has the least output error on sampled rows."""
    want = x_TD @ w_ND.mT

    def error(candidate: tuple[Rotation, T]) -> float:
        return float((simulated(candidate[0], w_ND, x_TD, clip=clip) - want).square().sum())

    return min(candidates, key=error)[1]


def _floored(absmax_D: Tensor) -> Tensor:
    return absmax_D.clamp_min(float(absmax_D.max()) * FLOOR).clamp_min(1e-20)
