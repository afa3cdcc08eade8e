"""E2M1, its packing, the scale bytes, and rows of activations in NVFP4 and MXFP4."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_spec import FP4, tiny_spec
from torch import Tensor

from dirotq.kernels.formats import fp4
from dirotq.kernels.spec import QuantSpec
from dirotq.kernels.transform_quantize import quantize_rows

FORMATS = tuple(fp4.GROUPS)
every_format = pytest.mark.parametrize("name", FORMATS)
ONE = torch.ones(1)


def e2m1(pattern: int) -> float:
    """The number of a bit pattern, from the fields of the format: sign, 2 exponent, 1 mantissa."""
    exponent, mantissa = pattern >> 1 & 3, pattern & 1
    magnitude = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
    return -magnitude if pattern & 8 else magnitude


def e4m3(pattern: int) -> float:
    exponent, mantissa = pattern >> 3 & 15, pattern & 7
    return 2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8


def spec_of(name: str) -> QuantSpec:
    return tiny_spec(**FP4[name])


def rows(seed: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(5, 64, generator=generator)
    return gauss * torch.exp(spread * torch.randn(5, 64, generator=generator))


def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    return (
        codes.double().unflatten(-1, (scale.shape[-1], -1)) * scale.double()[..., None]
    ).flatten(-2)


def test_rounding_is_a_search_over_all_patterns():
    """Every multiple of 1/64 from -8 to 8: the nearest number, of two the one with mantissa 0."""
    v = torch.arange(-512, 513).double() / 64
    for value, code in zip(v.tolist(), fp4.nearest_e2m1(v, torch.tensor(0.5)).tolist()):
        sign = 8 if value < 0 else 0
        best = min(range(8), key=lambda p: (abs(e2m1(sign | p) - value), p & 1))
        assert code / 2 == e2m1(sign | best), value


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5, 4), (7, 6), (1e30, 6)],
)
def test_ties_and_saturation(value, rounded):
    v = torch.tensor([value, -value])
    assert fp4.nearest_e2m1(v, torch.tensor(0.5)).tolist() == [2 * rounded, -2 * rounded]


def test_every_pattern_survives_its_byte():
    patterns = torch.arange(16, dtype=torch.uint8)
    packed = patterns | patterns.flip(0) << 4
    codes = fp4.unpack_e2m1(packed[None])
    assert (codes[0, ::2] / 2).tolist() == [e2m1(p) for p in range(16)]
    assert (codes[0, 1::2] / 2).tolist() == [e2m1(p) for p in reversed(range(16))]
    assert torch.equal(fp4.unpack_e2m1(fp4.pack_e2m1(codes)), codes)


def test_the_low_nibble_is_the_even_column():
    codes = torch.tensor([[1, -12, 0, 8]], dtype=torch.int8)
    assert fp4.pack_e2m1(codes).tolist() == [[0xF1, 0x60]]


@pytest.mark.parametrize("code", [5, 7, -9, 13, 127, -128])
def test_what_is_no_code_is_not_packed(code):
    with pytest.raises(ValueError, match=rf"{code} is no code"):
        fp4.pack_e2m1(torch.tensor([[1, code]], dtype=torch.int8))


@pytest.mark.parametrize("codes", [torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 4)])
def test_codes_are_int8_pairs(codes):
    with pytest.raises(ValueError, match="codes must be int8 with an even last dim"):
        fp4.pack_e2m1(codes)


def test_every_e4m3_scale_survives_its_byte():
    byte = torch.arange(127, dtype=torch.uint8)
    step = fp4.steps(byte, ONE)
    assert (2 * step).tolist() == [e4m3(p) for p in range(127)]
    assert torch.equal(fp4.group_scales(12 * step, ONE), byte)
    assert torch.equal(fp4.group_scales(12 * step * 2**-9, ONE * 2**-9), byte)


def test_e4m3_scales_are_the_nearest_and_saturate():
    scales = torch.tensor([e4m3(p) for p in range(127)], dtype=torch.float64)
    unit = torch.logspace(-4, 2.65, 500, dtype=torch.float64)
    byte = fp4.group_scales(6 * unit, ONE).long()
    want = (scales - unit[:, None]).abs().amin(1)
    torch.testing.assert_close((scales[byte] - unit).abs(), want, rtol=0, atol=1e-4)
    assert fp4.group_scales(torch.tensor([6 * 449.0, 1e30]), ONE).tolist() == [126, 126]


def test_every_e8m0_scale_survives_its_byte():
    byte = torch.arange(255, dtype=torch.uint8)
    step = fp4.steps(byte, None)
    assert step.double().tolist() == [2.0 ** (b - 128) for b in range(255)]
    kept = byte[:253]  # 4 * 2^126 is no float32
    for largest in (4.0, 5.9, 7.99):
        assert torch.equal(fp4.group_scales(2 * largest * step[:253], None), kept)


def test_what_is_not_finite_has_a_scale_that_is_not():
    amax = torch.tensor([torch.nan, 1.0])
    assert fp4.group_scales(amax, None).tolist() == [255, 125]
    assert fp4.group_scales(amax, ONE)[0] == 127
    for global_ in (None, ONE):
        assert fp4.steps(fp4.group_scales(amax, global_), global_).isnan().tolist() == [True, False]
    assert fp4.global_scale(amax).isnan().tolist() == [True, False]


@every_format
def test_zero_rows_and_groups_have_codes_zero(name):
    z = rows(0)
    z[1], z[2] = 0.0, 1e-38
    z[3, :32] = 0.0
    codes, scale = quantize_rows(z, spec_of(name))
    assert not codes[1:3].any()
    assert not codes[3, :32].any()
    assert codes[3, 32:].any()
    assert scale.isfinite().all()


@every_format
@given(st.integers(0, 10_000), st.floats(0, 2))
def test_half_a_step_within_range(name, seed, spread):
    z = rows(seed, spread)
    codes, scale = quantize_rows(z, spec_of(name))
    groups = z.double().unflatten(-1, (scale.shape[-1], -1)) / scale.double()[..., None]
    error = (codes.unflatten(-1, (scale.shape[-1], -1)).double() - groups).abs()
    magnitude = groups.abs()
    half = torch.where(magnitude < 4, 0.5, torch.where(magnitude < 8, 1.0, 2.0))
    inside = (magnitude <= 12) & (scale[..., None] > fp4.ZERO)
    assert (error <= half + 1e-6)[inside].all()
    beyond = magnitude > 12
    assert (codes.unflatten(-1, (scale.shape[-1], -1)).abs()[beyond] == 12).all()
    assert magnitude.max() < (16 if name == "mxfp4" else 24)


@every_format
@given(st.integers(0, 10_000), st.integers(-20, 20))
def test_powers_of_two_scale_through(name, seed, power):
    z, spec = rows(seed), spec_of(name)
    (codes, scale), (again, scaled) = quantize_rows(z, spec), quantize_rows(z * 2.0**power, spec)
    assert torch.equal(codes, again)
    assert torch.equal(scale * 2.0**power, scaled)


@every_format
@given(st.integers(0, 10_000))
def test_quantizing_twice_changes_nothing(name, seed):
    spec = spec_of(name)
    codes, scale = quantize_rows(rows(seed, 0.5), spec)
    again, rescaled = quantize_rows(dequantized(codes, scale).float(), spec)
    assert torch.equal(codes, again)
    torch.testing.assert_close(rescaled, scale, rtol=1e-6, atol=0)


@every_format
def test_a_row_does_not_depend_on_the_others(name):
    z, spec = rows(1), spec_of(name)
    codes, scale = quantize_rows(z, spec)
    z[1:] *= 1000
    again, rescaled = quantize_rows(z[:2], spec)
    assert torch.equal(again[0], codes[0])
    assert torch.equal(rescaled[0], scale[0])


@every_format
def test_scales_of_rows_are_what_bytes_mean(name):
    """Half of E4M3 times the row's global scale, or half of a power of two; nothing between."""
    z = rows(2)
    _, scale = quantize_rows(z, spec_of(name))
    assert scale.shape == (5, 64 // fp4.GROUPS[name])
    if name == "mxfp4":
        assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
        return
    global_ = z.abs().amax(1, keepdim=True) / (6 * 448)
    micro = 2 * scale / global_
    torch.testing.assert_close(micro, micro.to(torch.float8_e4m3fn).float(), rtol=1e-6, atol=0)
    assert (micro.amax(1) - 448).abs().max() < 1e-3


def test_mx_rule_by_hand():
    """Largest magnitude 5: exponent floor(log2 5) - 2 = 0. Largest 7: the same, so 7 saturates."""
    z = torch.zeros(2, 64)
    z[0, :4] = torch.tensor([5.0, -1.4, 0.3, 2.5])
    z[0, 32:34] = torch.tensor([7.0, 3.4])
    codes, scale = quantize_rows(z, spec_of("mxfp4"))
    assert scale[0].tolist() == [0.5, 0.5]
    assert codes[0, :4].tolist() == [8, -3, 1, 4]
    assert codes[0, 32:34].tolist() == [12, 6]
