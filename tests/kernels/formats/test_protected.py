import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_spec import tiny_spec

from dirotq.kernels.formats.protected import (
    dequantize_protected,
    quantize_protected,
    rounded_coefficients,
)
from dirotq.kernels.linear import QuantLinear, frozen
from dirotq.kernels.plan import choose


@given(st.integers(0, 10_000), st.floats(1e-6, 1e6))
def test_codes_are_within_half_a_step_on_stored_scales(seed, size):
    v = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed)) * size
    codes, scale = quantize_protected(v)
    assert codes.abs().max() <= 127
    assert scale.dtype == torch.bfloat16
    step = scale.float()
    # A scale that was rounded down cuts off up to 2^-9 of the largest entry: half a step more.
    assert ((dequantize_protected(codes, scale) - v).abs() <= 1.01 * step).all()


def test_zero_rows_stay_zero():
    v = torch.zeros(2, 4)
    codes, scale = quantize_protected(v)
    assert not dequantize_protected(codes, scale).any()
    assert not rounded_coefficients(v).any()


def test_coefficients_keep_their_largest_entry():
    c = torch.tensor([[127.0, 3.4, -0.6], [1.0, -2.0, 0.0]])
    torch.testing.assert_close(rounded_coefficients(c)[0], torch.tensor([127.0, 3.0, -1.0]))
    torch.testing.assert_close(rounded_coefficients(c)[1, 1], torch.tensor(-2.0))


def test_a_packed_linear_computes_with_its_eight_bit_branch():
    torch.manual_seed(0)
    spec = tiny_spec(rank=16, protected_bits=8)
    module = QuantLinear(spec, bias=False)
    v = torch.randn(48, 16)
    module.qweight.zero_()
    module.wscale.fill_(1)
    module.basis.copy_(torch.linalg.qr(torch.randn(64, 16)).Q)
    module.wp, module.wpscale = map(frozen, quantize_protected(v))
    x = torch.randn(7, 64)
    c = rounded_coefficients(x @ module.basis.float())
    want = c @ dequantize_protected(module.wp, module.wpscale).T
    torch.testing.assert_close(module(x), want)
    assert (module(x) - x @ module.basis.float() @ v.T).norm() < 0.02 * want.norm()
    torch.testing.assert_close(module(x, rows=slice(8, 20)), module(x)[:, 8:20])


def test_methods_without_a_kernel_say_so():
    for changes, why in (
        ({"rank": 16, "protected_bits": 8}, "8-bit protected"),
        ({"rank": 16, "branch": "beside"}, "beside the whole input"),
        ({"smooth": True}, "smoothed"),
        ({"transform": "regular", "block": 16}, "regular Hadamard"),
    ):
        plan = choose(90, 128, 48, tiny_spec(**changes), torch.bfloat16)
        assert (plan.engine, why in plan.why) == ("reference", True), changes
    assert choose(90, 128, 48, tiny_spec(rank=16), torch.bfloat16).engine != "reference"
