import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_spec import tiny_spec
from torch import Tensor

from dirotq.kernels.formats.hadamard import hadamard_matrix
from dirotq.kernels.transform_quantize import quantize_rows, transform, transform_quantize

FORMATS = {
    "token4": tiny_spec(),
    "token8": tiny_spec(act_bits=8),
    "group4": tiny_spec(act_scale="group"),
    "group8": tiny_spec(act_scale="group", act_bits=8),
    "pow2": tiny_spec(act_scale="pow2"),
}
every_format = pytest.mark.parametrize("spec", FORMATS.values(), ids=FORMATS)
POW2_BOUND = 7 * (1 / 0.9 - 1)
"""Steps that the largest value of a group may lose to the 0.9 clip; more than half of one."""


def rows(seed: int, count: int = 8, dim: int = 64) -> Tensor:
    """Gaussian rows of very different sizes, groups of different sizes within a row."""
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(count, dim, generator=generator)
    of_row = torch.exp(4 * torch.randn(count, 1, generator=generator))
    of_group = torch.exp(1.5 * torch.randn(count, dim // 16, generator=generator))
    return gauss * of_row * of_group.repeat_interleave(16, 1)


def values(codes: Tensor, scale: Tensor) -> Tensor:
    """What the codes stand for, float64."""
    return (
        codes.double().unflatten(-1, (scale.shape[-1], -1)) * scale.double()[..., None]
    ).flatten(-2)


def powers(z: Tensor, group: int) -> Tensor:
    """Per group of each row, the smallest 2^e in 1/16 ... 1 that is >= 0.9 of its share; [M, K]."""
    share = 0.9 * z.unflatten(-1, (-1, group)).abs().amax(-1) / z.abs().amax(-1, keepdim=True)
    ladder = torch.tensor([2.0**-e for e in range(4, -1, -1)])
    fits = share[..., None] <= ladder
    return ladder[fits.int().argmax(-1)].repeat_interleave(group, -1)


@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(FORMATS)))
def test_codes_stay_in_range_and_within_half_a_step(seed, name):
    spec, z = FORMATS[name], rows(seed)
    codes, scale = quantize_rows(z, spec)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == (len(z), 4 if spec.activations.name == "group" else 1)
    error = (values(codes, scale) - z.double()).abs()
    step = scale.double().repeat_interleave(64 // scale.shape[1], 1)
    if name == "pow2":
        step = step * 16 * powers(z, 16)
        assert (error <= step * POW2_BOUND * (1 + 1e-5)).all()
        clipped = z.abs() > 7 * step
        assert (error <= step * 0.5 * (1 + 1e-5))[~clipped].all()
    else:
        assert codes.abs().max() == (7 if spec.activations.bits == 4 else 127)
        assert (error <= step * 0.5 * (1 + 1e-5)).all()


@given(st.integers(0, 2**32 - 1))
def test_pow2_codes_are_four_bits_shifted_and_exact_in_fp8(seed):
    z = rows(seed)
    codes, _ = quantize_rows(z, FORMATS["pow2"])
    shift = 16 * powers(z, 16)
    assert (codes % shift == 0).all()
    assert (codes.abs() / shift <= 7).all()
    in_fp8 = codes.float().to(torch.float8_e4m3fn).float()
    assert torch.equal(in_fp8, codes.float())


@given(st.integers(0, 2**32 - 1))
def test_rms_scales_are_those_of_any_rotation(seed):
    """The row scale can be known before the rotation, as long as that keeps lengths."""
    spec, z = tiny_spec(act_scale="rms"), rows(seed).double()
    turned = z @ hadamard_matrix(64, torch.float64, z.device)
    codes, scale = quantize_rows(z, spec)
    torch.testing.assert_close(quantize_rows(turned, spec)[1], scale, rtol=1e-5, atol=0)
    want = z.square().mean(1).sqrt() * 20 / 7 / 16
    torch.testing.assert_close(scale[:, 0].double(), want, rtol=1e-5, atol=0)
    assert codes.dtype == torch.int8
    assert torch.equal(codes.float().to(torch.float8_e4m3fn).float(), codes.float())


@pytest.mark.parametrize(("act_bits", "worst"), [(4, 1.01), (8, 0.25)])
def test_rms_scales_lose_no_more_than_largest_values_do(act_bits, worst):
    """Gaussian rows, as a rotation makes them: 4 bits like pow2, 8-bit floats far less."""
    z = torch.randn(64, 3072, generator=torch.Generator().manual_seed(0))

    def lost(spec) -> float:
        return float((values(*quantize_rows(z, spec)) - z).norm())

    pow2 = lost(tiny_spec(dim=3072, act_scale="pow2"))
    assert lost(tiny_spec(dim=3072, act_scale="rms", act_bits=act_bits)) < worst * pow2


@given(st.integers(0, 2**32 - 1))
def test_floats_keep_four_significant_bits(seed):
    z = rows(seed)
    codes, scale = quantize_rows(z, tiny_spec(act_scale="rms", act_bits=8))
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.shape == (8, 1)
    within = z.abs() <= 20 * z.square().mean(1, keepdim=True).sqrt()
    error = (values(codes.float(), scale) - z.double()).abs()
    assert (error <= 2.0**-4 * z.abs() + 2.0**-10 * scale)[within].all()


@pytest.mark.parametrize(
    ("share", "shift"),
    [(1.0, 16), (0.56, 16), (0.55, 8), (0.28, 8), (0.27, 4), (0.13, 2), (0.06, 1), (1e-6, 1)],
)
def test_pow2_takes_the_smallest_power_that_holds_nine_tenths(share, shift):
    # The row's largest value 112 makes the scale 1: codes are the values, on a grid of `shift`.
    z = torch.zeros(1, 64)
    z[0, 5] = -112.0
    z[0, 16:32] = torch.linspace(-1, 1, 16) * share * 112
    codes, scale = quantize_rows(z, FORMATS["pow2"])
    assert scale.item() == 1.0
    assert codes[0, 5] == -112
    want = (z[0, 16:32].double() / shift).round().clamp(-7, 7) * shift
    assert codes[0, 16:32].tolist() == want.tolist()


def test_pow2_just_fits_at_the_boundary():
    row = torch.tensor(112.0)
    peak = torch.tensor(0.5 / 0.9 * 112)
    for _ in range(8):  # to the float whose nine tenths are exactly one half of the row's
        too_large = peak / row * 0.9 > 0.5
        peak = torch.nextafter(peak, torch.tensor(0.0 if too_large else 112.0))
        if peak / row * 0.9 == 0.5:
            break
    assert peak / row * 0.9 == 0.5
    z = torch.zeros(1, 64)
    z[0, 0], z[0, 16], z[0, 17] = row, peak, 7.9
    codes, _ = quantize_rows(z, FORMATS["pow2"])
    assert codes[0, 16:18].tolist() == [56, 8]  # the group's power is 2^-1


def test_known_row():
    z = torch.tensor([[14.0, -14.0, 2.9, 0.9, 1.0, -3.0]])
    codes, scale = quantize_rows(z, tiny_spec(dim=6))
    assert scale.item() == 2.0
    assert codes.tolist() == [[7, -7, 1, 0, 0, -2]]  # ties go to the even code


@every_format
def test_grid_values_are_fixed_points(spec):
    codes, scale = quantize_rows(rows(3), spec)
    again, scale_again = quantize_rows(values(codes, scale).float(), spec)
    assert torch.equal(again, codes)
    torch.testing.assert_close(scale_again, scale)


@every_format
def test_each_row_is_on_its_own(spec):
    z = rows(4)
    codes, scale = quantize_rows(z, spec)
    for i in range(len(z)):
        alone = quantize_rows(z[i : i + 1], spec)
        assert torch.equal(alone[0], codes[i : i + 1])
        assert torch.equal(alone[1], scale[i : i + 1])


@every_format
def test_zero_rows_and_zero_groups(spec):
    z = rows(5)
    z[2] = 0.0
    z[3, 16:32] = 0.0
    codes, scale = quantize_rows(z, spec)
    assert not codes[2].any()
    assert not scale[2].any()
    assert not codes[3, 16:32].any()
    assert scale.isfinite().all()
    assert codes[3].any()


@every_format
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-32, 1e-29, 1e30, 3e38])
def test_extreme_sizes_give_finite_codes(spec, size):
    z = torch.sign(torch.randn(2, 64)) * size
    codes, scale = quantize_rows(z, spec)
    assert scale.isfinite().all()
    # Rows too small to scale are zero; nothing may come out larger than it went in.
    assert (values(codes, scale).abs() <= z.double().abs() * (1 + 1e-5)).all()
    if size > 1e-29:
        assert (codes.abs() == codes.abs().max()).all()
        assert codes.any()


@every_format
def test_one_huge_outlier_costs_the_others_their_codes_but_nothing_else(spec):
    z = torch.full((1, 64), 0.5)
    z[0, 7] = 1e6
    codes, scale = quantize_rows(z, spec)
    torch.testing.assert_close(values(codes, scale)[0, 7].item(), 1e6)
    assert not codes[0, 8:16].any()
    if spec.activations.name == "group":
        torch.testing.assert_close(values(codes, scale)[0, 16:], torch.full((48,), 0.5).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_transform_hadamard_projects_out_then_spreads(dtype):
    spec = tiny_spec(rank=8, block=16)
    x = torch.randn(2, 5, 64, dtype=torch.float64)
    p = torch.linalg.qr(torch.randn(64, 8, dtype=torch.float64)).Q
    h = torch.block_diag(*[hadamard_matrix(16, torch.float64, torch.device("cpu"))] * 4)
    z, c = transform(x.to(dtype), p, None, spec)
    assert z.dtype == c.dtype == dtype
    tolerance = {"atol": 0.1, "rtol": 0} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(c.double(), x @ p, **tolerance)
    torch.testing.assert_close(z.double(), (x - x @ p @ p.T) @ h, **tolerance)


def test_transform_splits_the_energy():
    x = torch.randn(5, 64, dtype=torch.float64)
    p = torch.linalg.qr(torch.randn(64, 8, dtype=torch.float64)).Q
    z, c = transform(x, p, None, tiny_spec(rank=8, block=64))
    total = z.square().sum(-1) + c.square().sum(-1)
    torch.testing.assert_close(total, x.square().sum(-1))


def test_transform_dense_is_two_products():
    spec = tiny_spec(rank=8, transform="dense")
    x, p, t = torch.randn(5, 64), torch.randn(64, 8), torch.randn(64, 56)
    z, c = transform(x, p, t, spec)
    torch.testing.assert_close(z, x @ t)
    torch.testing.assert_close(c, x @ p)


def test_transform_at_rank_zero_and_block_one_is_nothing():
    x = torch.randn(5, 64)
    z, c = transform(x, None, None, tiny_spec())
    assert z is x
    assert c is None


@every_format
def test_transform_quantize_is_its_two_halves(spec):
    spec = dataclasses.replace(tiny_spec(rank=8, block=16), activations=spec.activations)
    x, p = torch.randn(6, 64), torch.linalg.qr(torch.randn(64, 8)).Q
    codes, scale, c = transform_quantize(x, p, None, spec)
    z, want_c = transform(x, p, None, spec)
    want_codes, want_scale = quantize_rows(z, spec)
    assert torch.equal(codes, want_codes)
    assert torch.equal(scale, want_scale)
    assert torch.equal(c, want_c)


LZS = tiny_spec(act_scale="lzs")


def units(codes: Tensor) -> Tensor:
    """Per group of 16, what its first kept bit's place makes of a code of 1; [M, K]."""
    largest = codes.abs().unflatten(-1, (-1, 16)).amax(-1)
    ladder = torch.tensor([8, 16, 32, 64, 128])
    return (2 ** (largest[..., None] >= ladder).sum(-1)).clamp(max=16).repeat_interleave(16, -1)


@given(st.integers(0, 2**32 - 1))
def test_leading_bits_are_sign_and_three_bits_of_each_group(seed):
    z = rows(seed)
    codes, scale = quantize_rows(z, LZS)
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (8, 1))
    torch.testing.assert_close(scale[:, 0] * 127, z.abs().amax(1))
    unit = units(codes)
    assert (codes % unit == 0).all()
    assert (codes.abs() / unit <= 7).all()
    assert torch.equal(codes.float().to(torch.float8_e4m3fn).float(), codes.float())
    # Half a step by rounding to 8 bits, then less than a unit is cut off, towards zero.
    exact = z.double() / scale.double()
    assert ((values(codes, torch.ones_like(scale)) - exact).abs() <= unit - 0.5 + 1e-4).all()
    assert (codes.abs() <= exact.abs() + 0.5 + 1e-4).all()


@pytest.mark.parametrize(
    ("largest", "unit"),
    [(7, 1), (8, 2), (15, 2), (16, 4), (31, 4), (32, 8), (63, 8), (64, 16), (127, 16)],
)
def test_leading_bits_begin_at_the_highest_that_is_set_in_a_group(largest, unit):
    z = torch.zeros(1, 64)
    z[0, 0] = 127.0  # makes the scale 1, and leaves the next group alone
    z[0, 16:19] = torch.tensor([-largest, largest - 1.0, 5.0])
    codes, scale = quantize_rows(z, LZS)
    assert scale.item() == 1.0
    want = [-(largest // unit) * unit, (largest - 1) // unit * unit, 5 // unit * unit]
    assert codes[0, 16:19].tolist() == want


@pytest.mark.parametrize(("value", "code"), [(7.49, 7), (7.51, 8), (-8.9, -8), (15.51, 16)])
def test_leading_bits_are_those_of_the_rounded_integer(value, code):
    z = torch.zeros(1, 64)
    z[0, 0], z[0, 20] = 127.0, value
    assert quantize_rows(z, LZS)[0][0, 20] == code


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-31, 1e-29, 1e30, 3e38])
def test_leading_bits_of_extreme_rows_are_finite(size):
    codes, scale = quantize_rows(torch.full((2, 64), -size), LZS)
    assert scale.isfinite().all()
    assert codes.unique().tolist() == ([-112] if size > 1e-30 else [0])


def test_what_is_not_a_number_shows_in_a_row_of_leading_bits():
    z = rows(6)
    z[1, 3] = torch.nan
    _, scale = quantize_rows(z, LZS)
    assert scale.isnan()[:, 0].tolist() == [i == 1 for i in range(8)]


def test_cut_off_bits_cost_gaussian_rows_more_than_rounded_ones():
    z = torch.randn(64, 3072, generator=torch.Generator().manual_seed(0))
    lost = {
        scale: float((values(*quantize_rows(z, tiny_spec(dim=3072, act_scale=scale))) - z).norm())
        for scale in ("pow2", "lzs")
    }
    assert 1.5 * lost["pow2"] < lost["lzs"] < 2.5 * lost["pow2"]
