"""The protected branch and the bias as FP8 columns: their product is c (W P)ᵀ + bias."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dirotq.kernels.appended import (
    BIAS_LIMIT,
    LIMIT,
    appended_part,
    columns_with_appended,
    split_fp8,
    with_appended,
)
from dirotq.kernels.formats.activation import POW2_LEVELS
from dirotq.kernels.formats.pack_int4 import pack_int4
from dirotq.kernels.unpack_w4 import unpack_w4
from dirotq.kernels.w4a4_linear import w4a4_linear

FP8 = torch.float8_e4m3fn
COUNTED = {"int4": 1, "lm4": 16}


@given(st.integers(0, 2**32 - 1), st.integers(-2, 8))
def test_two_fp8_numbers_hold_a_bfloat16(seed, exponent):
    v = torch.rand(64, generator=torch.Generator().manual_seed(seed)) + 1
    v = (v * 2.0**exponent).clamp_max(448).bfloat16()
    high, low = split_fp8(v)
    assert torch.equal(high.float() + low.float(), v.float())


def test_small_values_lose_at_most_half_of_fp8s_smallest_step():
    v = torch.linspace(-0.25, 0.25, 4001).bfloat16()
    high, low = split_fp8(v)
    assert ((high.float() + low.float() - v.float()).abs() <= 2.0**-10).all()


@pytest.mark.parametrize(
    ("width", "rank", "bias", "part", "columns"),
    [
        (3072, 64, True, 80, 3328),
        (3072, 64, False, 64, 3328),
        (3072, 0, True, 16, 3200),
        (3072, 0, False, 0, 3072),
        (5600, 16, False, 16, 5760),
        (1152, 63, True, 64, 1408),
    ],
)
def test_widths(width, rank, bias, part, columns):
    assert appended_part(rank, bias) == part
    assert columns_with_appended(width, rank, bias) == columns


def operands(seed: int, rank: int, bias: bool, levels: int, size: float):
    """M = 6, N = 10, K = 96: codes, scales, c, packed weights, W P and bias of many sizes."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-7, 8, (6, 96), generator=g) * 2**levels
    scale = torch.exp(3 * torch.randn(6, 1, generator=g)) * 2.0**-levels
    # Coefficients of up to about 1000 steps of the row: the largest an outlier leaves.
    c = torch.randn(6, rank, generator=g) * scale * 2.0**levels * size
    weight = torch.randint(-7, 8, (10, 96), generator=g, dtype=torch.int8)
    wscale = torch.exp(torch.randn(10, 1, generator=g)).bfloat16()
    wp = (torch.rand(10, rank, generator=g) * 2 - 1) * LIMIT / 8 * wscale.float()
    beta = (torch.rand(10, generator=g) * 2 - 1) * BIAS_LIMIT / 8 * wscale.float()[:, 0]
    return (
        codes.to(torch.int8),
        scale,
        c.bfloat16() if rank else None,
        pack_int4(weight),
        wscale,
        wp.bfloat16() if rank else None,
        beta.bfloat16() if bias else None,
    )


def product(codes: Tensor, scale: Tensor, weights: Tensor, wscale: Tensor) -> Tensor:
    """What ``torch._scaled_mm`` computes, float64."""
    return codes.double() @ weights.double().T * scale.double() * wscale.double().T


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 8, 15, 24]),
    st.booleans(),
    st.sampled_from([0, POW2_LEVELS]),
    st.sampled_from([0.01, 1.0, 30.0, 1000.0]),
    st.sampled_from(["int4", "lm4"]),
)
def test_one_product_is_the_whole_linear(seed, rank, bias, levels, size, element):
    codes, scale, c, qweight, wscale, wp, beta = operands(seed, rank, bias, levels, size)
    left, left_scale = with_appended(
        codes, scale, c, bits_below=levels, bias=bias, counted=COUNTED[element]
    )
    right = unpack_w4(qweight, FP8, wscale, wp, beta, element)
    assert left.shape[1] == right.shape[1] == columns_with_appended(96, rank, bias)
    assert left.float().isfinite().all()
    assert right.float().isfinite().all()
    got = product(left, left_scale, right, wscale)
    want = w4a4_linear(codes, scale, c, qweight, wscale, wp, beta, None, element).double()
    # Low times low is left out: 2^-8 of each product; values below 2^-2 lose up to 2^-10 of a unit.
    terms = torch.zeros_like(want)
    if c is not None and wp is not None:
        terms += c.double().abs() @ wp.double().abs().T
        units = (
            left_scale.double() / 2 * (wp.double().abs().sum(1)[None] + rank * wscale.double().T)
        )
        terms += units * 2.0**-2 + c.double().abs().sum(1, keepdim=True) * wscale.double().T
    if beta is not None:
        terms += beta.double().abs() + 8 * wscale.double().T
        terms += left_scale.double() / 2 * beta.double().abs() / 4
    assert ((got - want).abs() <= 2.0**-7 * terms + 1e-5 * want.abs()).all()


@pytest.mark.parametrize("levels", [0, POW2_LEVELS])
@pytest.mark.parametrize("element", ["int4", "lm4"])
def test_without_appended_columns_the_product_is_exact(levels, element):
    codes, scale, _, qweight, wscale, _, _ = operands(0, 0, False, levels, 1.0)
    scale = torch.exp2(scale.log2().round())
    left, left_scale = with_appended(
        codes, scale, None, bits_below=levels, bias=False, counted=COUNTED[element]
    )
    right = unpack_w4(qweight, FP8, wscale, element=element)
    got = product(left, left_scale, right, wscale)
    want = w4a4_linear(codes, scale, None, qweight, wscale, None, None, None, element)
    assert torch.equal(got, want.double())


def test_rows_of_zeros_are_their_protected_part():
    codes, scale, c, qweight, wscale, wp, beta = operands(1, 8, True, 0, 1.0)
    codes[0], scale[0] = 0, 0
    codes[1], scale[1], c[1] = 0, 0, 0
    left, left_scale = with_appended(codes, scale, c, bits_below=0, bias=True)
    assert left_scale.isfinite().all()
    assert (left_scale > 0).all()
    got = product(left, left_scale, unpack_w4(qweight, FP8, wscale, wp, beta), wscale)
    want = w4a4_linear(codes, scale, c, qweight, wscale, wp, beta).double()
    top = c.double().abs() @ wp.double().abs().T + beta.double().abs() + wscale.double().T
    assert ((got - want)[:2].abs() <= 2.0**-7 * top[:2]).all()


def test_a_large_coefficient_halves_the_codes_of_its_row_exactly():
    codes, scale, c, *_ = operands(2, 8, False, POW2_LEVELS, 1.0)
    c[3, 2] = 2.0**14 * scale[3, 0] * 2**POW2_LEVELS
    left, left_scale = with_appended(codes, scale, c, bits_below=POW2_LEVELS, bias=False)
    assert left.float().abs().max() <= 448
    plain, plain_scale = with_appended(codes, scale, c * 0, bits_below=POW2_LEVELS, bias=False)
    k = (left_scale / plain_scale).log2()
    assert k[3] > 0
    assert torch.equal(left[:, :128].float() * 2**k, plain[:, :128].float())
