"""Distances between two sets of images, from features [N, F] of a network that looks at them.

Both are biased or noisy where images are few: FID grows as N falls (it fits F² / 2 covariances), so
it is read against the same distance between two runs of the 16-bit model, never alone.
"""

import warnings

import torch
from torch import Tensor
from torch.nn import Identity
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance


def frechet_distance(features_NF: Tensor, others_MF: Tensor) -> float:
    """FID of features: |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^1/2), in float64 (Heusel et al. 2017).

    Raises ValueError for fewer than two images in a set: there is no covariance.
    """
    _refuse_few(features_NF, others_MF)
    network = Identity()
    network.num_features = features_NF.shape[1]  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    metric.update(others_MF.double().cpu(), real=True)
    metric.update(features_NF.double().cpu(), real=False)
    # Rounding may leave a trifle below zero between equal sets.
    return max(float(metric.compute()), 0.0)


def kernel_distance(features_NF: Tensor, others_MF: Tensor) -> float:
    """KID of features: the unbiased estimate of the squared maximum mean discrepancy with kernel
    (x·y / F + 1)³, on all images at once (Binkowski et al. 2018). It may be below zero.

    Raises ValueError for fewer than two images in a set, or sets of different sizes.
    """
    _refuse_few(features_NF, others_MF)
    if len(features_NF) != len(others_MF):
        raise ValueError(f"KID of {len(features_NF)} and {len(others_MF)} images: use equally many")
    # One subset of everything: nothing is drawn, so nothing depends on a seed.
    with warnings.catch_warnings(action="ignore"):  # that it keeps all features
        metric = KernelInceptionDistance(Identity(), subsets=1, subset_size=len(features_NF))
    metric.set_dtype(torch.float64)
    metric.update(others_MF.double().cpu(), real=True)
    metric.update(features_NF.double().cpu(), real=False)
    return float(metric.compute()[0])


def _refuse_few(*sets: Tensor) -> None:
    if few := [len(features) for features in sets if len(features) < 2]:
        raise ValueError(f"a distance between sets of images needs two of each, not {few[0]}")
