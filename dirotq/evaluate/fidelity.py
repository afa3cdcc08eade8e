"""How close an image is to the 16-bit model's image of the same prompt and noise.

torchmetrics is imported where it is used: it takes a second, and a cached run needs none of it.
"""

import torch
from torch import Tensor

BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of MS-SSIM's five scales (Wang, Simoncelli and Bovik 2003)."""
WINDOW = 11
"""Side of SSIM's Gaussian window."""
PSNR_LIMIT = 104.1
"""dB between equal images that were each rounded to 16 bits (dirotq/evaluate/images.py)."""


def fidelity(got: Tensor, want: Tensor) -> dict[str, list[float]]:
    """Compute PSNR (dB, at most ``PSNR_LIMIT``), SSIM and MS-SSIM of each pair of images.

    got, want  float [B, 3, H, W] or videos [B, F, 3, H, W] in [0, 1]; of a video, the score of its
               frames together
    """
    kinds = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}
    if got.dim() == 4:
        return {name: score(got, want).tolist() for name, score in kinds.items()}
    videos = list(zip(got, want, strict=True))
    # A video's frames have one error, and the mean of their similarities.
    found = {name: [float(score(*pair).mean()) for pair in videos] for name, score in kinds.items()}
    return found | {"psnr": [float(psnr(*(v.flatten(0, 1)[None] for v in p))) for p in videos]}


def psnr(got: Tensor, want: Tensor) -> Tensor:
    """Compute PSNR in dB for range 1, [B], at most ``PSNR_LIMIT``: more, storage can't tell."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    whole = tuple(range(1, got.dim()))
    ratio_B = peak_signal_noise_ratio(got, want, data_range=1.0, reduction="none", dim=whole)
    return ratio_B.clamp_max(PSNR_LIMIT)


def ssim(got: Tensor, want: Tensor) -> Tensor:
    """Compute SSIM of images [B, 3, H, W] in [0, 1], [B]: Gaussian window (Wang et al. 2004)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    each_B = structural_similarity_index_measure(got, want, data_range=1.0, reduction="none")
    # Float32 rounding may leave a trifle above one.
    return each_B.reshape(-1).clamp_max(1.0)


def ms_ssim(got: Tensor, want: Tensor) -> Tensor:
    """Compute MS-SSIM of images [B, 3, H, W] in [0, 1], [B], on as many scales as they allow.

    torchmetrics wants sides of 176 pixels for five scales, 99 for four (so a 128-pixel image has
    four) and 44 for three. The weights of the scales that are left are divided by their sum, so
    that the exponents add up to 1 as all five do; scores of different scale counts don't compare.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    if scales(min(got.shape[-2:])) == 1:
        return ssim(got, want)
    betas = torch.tensor(BETAS[: scales(min(got.shape[-2:]))], dtype=torch.float64)
    weights = tuple((betas / betas.sum()).tolist())
    each_B = multiscale_structural_similarity_index_measure(
        got, want, data_range=1.0, betas=weights, reduction="none"
    )
    return each_B.reshape(-1)


def scales(side: int) -> int:
    """Count the scales of MS-SSIM that fit a shorter side of ``side`` pixels; at least 1."""
    fitting = (n for n in range(len(BETAS), 1, -1) if side // (n - 1) ** 2 > WINDOW - 1)
    return next(fitting, 1)
