"""Attention without a GPU: torch's against float64, and what the INT8 specification promises."""

import math

import pytest
import torch
from attending import attention
from torch import Tensor

from dirotq.kernels.attention import reference, why_not
from dirotq.kernels.attention.reference import K_BLOCK, attend, quantize
from dirotq.kernels.build import FP8_CHIPS


def qkv(T: int = 200, S: int = 300, H: int = 2, d: int = 64, offset: float = 0.0):
    """Gaussian rows; ``offset``: what all keys of a head have in common, as in trained models."""
    g = torch.Generator().manual_seed(T * S + d)
    q, k, v = (torch.randn(2, n, H, d, generator=g) for n in (T, S, S))
    return q, k + offset * torch.randn(1, 1, H, d, generator=g), v


def wanted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale=None) -> Tensor:
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    logits = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    return (logits.softmax(-1) @ v).transpose(1, 2)


def int8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.attention(q, k, v, scale=q.shape[-1] ** -0.5)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("mode", ["exact", "fp8"])
def test_exact_is_the_softmax(mode, scale, mask):
    q, k, v = qkv()
    if mode == "fp8" and mask is None:
        pytest.skip("8 bits are not exact")
    g = torch.Generator().manual_seed(0)
    if mask == "bool":
        mask = torch.rand(2, 1, 200, 300, generator=g) > 0.3
    elif mask == "float":
        mask = torch.randn(1, 2, 1, 300, generator=g)
    got = attention(q, k, v, mode=mode, mask=mask, scale=scale)
    assert got.shape == q.shape
    assert error(got, wanted(q, k, v, mask, scale)) < 1e-6


@pytest.mark.parametrize("mode", ["exact", "fp8"])
def test_rows_may_lie_apart(mode):
    q, k, v = qkv(T=60, S=60)
    fused = torch.cat([t.flatten(2) for t in (q, k, v)], 2)
    views = [t.unflatten(2, (2, 64)) for t in fused.chunk(3, 2)]
    assert not views[0].is_contiguous()
    got = attention(*views, mode=mode)
    torch.testing.assert_close(got, attention(q, k, v, mode=mode), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["exact", "fp8"])
def test_output_has_the_inputs_dtype(mode, dtype):
    q, k, v = (t.to(dtype) for t in qkv(T=20, S=30))
    got = attention(q, k, v, mode=mode)
    assert got.dtype == dtype
    assert error(got, wanted(q, k, v)) < (0.07 if mode == "fp8" else 1e-2)


def test_8_bit_output_flattens_for_free():
    got = attention(*qkv(T=20, S=30), mode="fp8")
    assert got.flatten(2).data_ptr() == got.data_ptr()


@pytest.mark.parametrize("offset", [0.0, 5.0])
@pytest.mark.parametrize(("S", "d"), [(300, 64), (1000, 128), (77, 72)])
def test_8_bits_lose_little(S, d, offset):
    """Three fraction bits of P and v: 2.6 percent each of independent parts."""
    q, k, v = qkv(S=S, d=d, offset=offset)
    assert error(int8(q, k, v), wanted(q, k, v)) < 0.05


def test_logits_alone_lose_less_than_a_percent_of_their_spread():
    q, k, v = qkv(offset=5.0)
    codes = quantize(q, k, v, scale=1.0)
    scales = codes.k_scale_BHN.repeat_interleave(K_BLOCK, 2)[:, :, None, :300]
    got = codes.q_BHTd.float() @ codes.k_BHSd.float().mT * codes.q_scale_BHT[..., None] * scales
    smooth = k - k.mean(1, keepdim=True)
    want = (q.transpose(1, 2) @ smooth.permute(0, 2, 3, 1)).double() * math.log2(math.e)
    assert error(got, want) < 0.015


def test_what_all_keys_have_in_common_changes_nothing():
    q, k, v = qkv()
    for c in (4.0, 64.0):  # powers of two, few bits: nothing but rounding of k itself
        shifted = int8(q, k + c, v)
        assert error(shifted, int8(q, k, v).double()) < 5e-3


def test_what_all_values_have_in_common_comes_back():
    q, k, v = qkv()
    shifted = int8(q, k, v + 64) - 64
    assert error(shifted, int8(q, k, v).double()) < 5e-3


def test_rows_sum_to_one():
    q, k, v = qkv(offset=3.0)
    ones = int8(q, k, torch.full_like(v, 3.0))
    torch.testing.assert_close(ones, torch.full_like(ones, 3.0), rtol=1e-6, atol=0)
    # And as far as three fraction bits go without the mean's help.
    codes = quantize(q, k, torch.ones_like(v), scale=0.125)
    codes.v_BHSd.copy_(torch.ones_like(v).transpose(1, 2))
    codes.v_scale_BHd.fill_(1)
    codes.v_mean_BHd.zero_()
    sums = attend(codes)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=2e-2, atol=0)


def test_the_step_does_not_matter_much():
    """P is rounded against another maximum, no more."""
    codes = quantize(*qkv(), scale=0.125)
    want = attend(codes).double()
    assert error(attend(codes, block=32), want) < 0.02


def test_codes_reach_their_ends_and_scales_bring_them_back():
    q, k, v = qkv(offset=2.0)
    codes = quantize(q, k, v, scale=1.0)
    assert (codes.q_BHTd.abs().amax(3) == 127).all()
    assert codes.k_BHSd[:, :, :K_BLOCK].abs().amax() == 127
    assert (codes.v_BHSd.float().abs().amax(2) == 448).all()
    assert codes.k_scale_BHN.shape == (2, 2, 3)
    back = codes.v_BHSd.float() * codes.v_scale_BHd[:, :, None] + codes.v_mean_BHd[:, :, None]
    assert error(back, v.transpose(1, 2).double()) < 0.03


def test_nothing_but_zeros_is_zeros():
    zeros = torch.zeros(1, 5, 1, 32)
    assert not int8(zeros, zeros, zeros).any()


@pytest.mark.parametrize("chip", [None, 75, 80, 86])
def test_old_chips_have_no_8_bits(chip):
    assert why_not(chip)


def test_newer_chips_have_it(monkeypatch):
    pytest.importorskip("triton")
    assert not any(why_not(chip) for chip in FP8_CHIPS)
    assert "200 channels" in why_not(90, 200)
    assert why_not(90, 72) is None
    assert "float32" in why_not(90, 72, torch.float32)


def test_torchs_choice_of_backends_is_left_alone():
    """It is the process's: others' attention goes on as torch chooses."""
    q, k, v = qkv(T=4, S=4)
    cuda = torch.backends.cuda
    switches = cuda.flash_sdp_enabled, cuda.cudnn_sdp_enabled, torch._C._get_sdp_priority_order
    before = [switch() for switch in switches]
    attention(q, k, v)
    assert [switch() for switch in switches] == before
