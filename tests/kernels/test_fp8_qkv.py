"""q, k and v in FP8: what the specification promises."""

import math

import pytest
import torch
from torch import Tensor

from dirotq.kernels.fp8_qkv.reference import Codes, attend, attention, quantize


def qkv(T: int = 200, S: int = 300, H: int = 2, d: int = 64, dtype=torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(T * S + d)
    return [torch.randn(2, n, H, d, generator=g).to(dtype) for n in (T, S, S)]


def wanted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, scale=q.shape[-1] ** -0.5)


def unrotated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with codes of q, k and v as they are."""
    scales = [t.abs().amax((1, 3)) / 448 for t in (q, k, v)]
    codes = [
        (t / s[:, None, :, None]).to(torch.float8_e4m3fn)
        for t, s in zip((q, k, v), scales, strict=True)
    ]
    return attend(Codes(*codes, *scales), scale=q.shape[-1] ** -0.5)


@pytest.mark.parametrize(("S", "d"), [(300, 64), (1000, 128), (77, 48), (50, 72), (9, 5)])
def test_gaussian_rows_lose_as_much_as_three_bits_do(S, d):
    q, k, v = qkv(S=S, d=d)
    got, want = fp8(q, k, v), wanted(q, k, v)
    assert error(got, want) < 0.06
    assert error(got, want) < 1.1 * error(unrotated(q, k, v), want)


def test_channels_that_stand_out_cost_half():
    q, k, v = qkv(d=128)
    for t in (q, k):
        t[..., [3, 40]] *= 4
    q, k = q / 1.5, k / 1.5
    want = wanted(q, k, v)
    assert error(fp8(q, k, v), want) < 0.6 * error(unrotated(q, k, v), want)


def test_what_all_keys_have_in_common_costs_nothing():
    q, k, v = qkv()
    k += 5 * torch.randn(1, 1, 2, 64, generator=torch.Generator().manual_seed(0))
    want = wanted(q, k, v)
    assert error(fp8(q, k, v), want) < 0.06
    assert error(unrotated(q, k, v), want) > 0.1


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_nothing_is_clipped_and_scales_bring_numbers_back(size):
    q, k, v = (size * t for t in qkv(d=64))
    q[0, 3] = 0
    q[0, 3, 1, 7] = 50 * size  # rotated, all 64 channels are a bound's eighth
    k[1, 5, 0] *= 30
    codes = quantize(q, k, v)
    for found, scale, plain in (
        (codes.q_BTHd, codes.q_scale_BH, q), (codes.k_BSHd, codes.k_scale_BH, k - k.mean(1, True)),
    ):  # fmt: skip
        assert found.float().abs().amax() < 448
        back = found.float() * scale[:, None, :, None]
        lengths = plain.norm(dim=-1)
        torch.testing.assert_close(back.norm(dim=-1), lengths, rtol=0.03, atol=0)
    assert (codes.v_BSHd.float().abs().amax((1, 3)) == 448).all()
    assert error(codes.v_BSHd.float() * codes.v_scale_BH[:, None, :, None], v.double()) < 0.03


def test_the_dtype_is_qs_and_rows_flatten_for_free():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        got = fp8(*qkv(T=20, S=30, dtype=dtype))
        assert got.dtype == dtype
        assert got.flatten(2).data_ptr() == got.data_ptr()


def test_logits_far_apart():
    """P's small numbers are zeros, the largest is exact."""
    q, k, v = qkv(T=4, S=8, d=16)
    k = 40 * k
    assert error(fp8(q, k, v), wanted(q, k, v)) < 0.08
    assert math.isfinite(error(fp8(q, 100 * k, v), wanted(q, 100 * k, v)))


def test_nothing_but_zeros_is_zeros():
    zeros = torch.zeros(1, 5, 1, 32)
    assert not fp8(zeros, zeros, zeros).any()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_bad_number_shows_and_stays_in_its_head(which):
    args = qkv(T=20, S=30)
    want = fp8(*args)
    args[which][0, 3, 1, 5] = torch.nan
    got = fp8(*args)
    assert torch.equal(got[:, :, 0], want[:, :, 0])
    assert got[0, :, 1].isnan().all()
