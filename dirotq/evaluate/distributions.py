"""Distances between two sets of images, from features [N, F] of a network that looks at them.

Both are biased or noisy where images are few: FID grows as N falls (it fits F² / 2 covariances), so
it is read against the same distance between two runs of the 16-bit model, never alone.
"""

import torch
from torch import Tensor
from torch.nn import Identity


def frechet_distance(features_NF: Tensor, others_MF: Tensor) -> float:
    """Return |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^1/2) in float64, FID (Heusel et al. 2017).

    Raises ValueError for fewer than two images in a set: there is no covariance.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    _refuse_few(features_NF, others_MF)
    network = Identity()
    network.num_features = features_NF.shape[1]  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    metric.update(others_MF.double().cpu(), real=True)
    metric.update(features_NF.double().cpu(), real=False)
    # Rounding may leave a trifle below zero between equal sets.
    return max(float(metric.compute()), 0.0)


def kernel_distance(features_NF: Tensor, others_NF: Tensor) -> float:
    """Compute KID of features in float64: the squared maximum mean discrepancy with the kernel
    k(x, y) = (x·y / F + 1)³ (Binkowski et al. 2018), estimated from pairs of different prompts:

        mean over i != j of k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i)

    (Gretton et al. 2012, the U-statistic for N pairs). It may be below zero. Image i of both sets
    has the same prompt and noise; the usual estimate, which takes them for independent and keeps
    k(x_i, y_i), would be far below zero between nearly equal sets.

    Raises ValueError for fewer than two images in a set, or sets of different sizes.
    """
    _refuse_few(features_NF, others_NF)
    if len(features_NF) != len(others_NF):
        raise ValueError(f"KID of {len(features_NF)} and {len(others_NF)} images: use equally many")
    x, y = features_NF.double().cpu(), others_NF.double().cpu()
    total = sum(
        sign * float((k := _kernel(a, b)).sum() - k.trace())
        for a, b, sign in ((x, x, 1), (y, y, 1), (x, y, -2))
    )
    return total / (len(x) * (len(x) - 1))


def _kernel(x_NF: Tensor, y_NF: Tensor) -> Tensor:
    return (x_NF @ y_NF.T / x_NF.shape[1] + 1) ** 3


def _refuse_few(*sets: Tensor) -> None:
    if few := [len(features) for features in sets if len(features) < 2]:
        raise ValueError(f"a distance between sets of images needs two of each, not {few[0]}")
