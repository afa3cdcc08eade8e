import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import avg_pool2d
from torchmetrics.functional.image.ssim import _ssim_update

from dirotq.evaluate.fidelity import BETAS, PSNR_LIMIT, fidelity, ms_ssim, psnr, scales, ssim


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    want = torch.full((2, 3, 16, 16), 0.5)
    got = want.clone()
    got[1] += 0.1
    found = fidelity(got, want)
    assert found["psnr"] == pytest.approx([PSNR_LIMIT, 20.0], abs=1e-3)
    assert found["ssim"][0] == found["ms_ssim"][0] == pytest.approx(1.0)
    # Constant images: luminance alone, (2ab + c) / (a² + b² + c) with c = 1e-4.
    assert found["ssim"][1] == pytest.approx((0.6 + 1e-4) / (0.61 + 1e-4), abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-3, 0.5), st.integers(0, 99))
def test_psnr_is_that_of_the_error(size, seed):
    want = noise(1, 3, 12, 12, seed=seed)
    got = want + size * torch.sign(noise(1, 3, 12, 12, seed=seed + 1) - 0.5)
    assert psnr(got, want).item() == pytest.approx(
        -20 * torch.log10(torch.tensor(size)).item(), abs=1e-2
    )


@pytest.mark.parametrize(
    ("side", "count"),
    [(8, 1), (11, 2), (32, 2), (43, 2), (44, 3), (98, 3), (99, 4), (128, 4), (175, 4), (176, 5)],
)
def test_scales_that_fit(side, count):
    assert scales(side) == count


def test_four_scales_are_the_definition():
    """Contrast and structure of three scales, SSIM of the fourth, exponents that add up to 1."""
    want = noise(1, 3, 128, 128)
    got = (want + 0.2 * (noise(1, 3, 128, 128, seed=1) - 0.5)).clamp(0, 1)
    weights = torch.tensor(BETAS[:4], dtype=torch.float64) / sum(BETAS[:4])
    product, a, b = 1.0, got, want
    for scale, weight in enumerate(weights.tolist()):
        whole, contrast = _ssim_update(a, b, data_range=1.0, return_contrast_sensitivity=True)
        product *= float(whole if scale == 3 else contrast) ** weight
        a, b = avg_pool2d(a, 2), avg_pool2d(b, 2)
    assert ms_ssim(got, want).item() == pytest.approx(product, abs=1e-5)


def test_images_with_room_for_one_scale_have_ssim():
    want, got = noise(1, 3, 10, 300), noise(1, 3, 10, 300) * 0.9
    assert scales(10) == 1
    assert ms_ssim(got, want).item() == ssim(got, want).item() < 1


def test_a_video_is_scored_as_its_frames_together():
    want = noise(1, 2, 3, 16, 16)
    got = want.clone()
    got[0, 1] += 0.1
    assert fidelity(got, want)["psnr"] == pytest.approx([20 + 3.0103], abs=1e-2)
