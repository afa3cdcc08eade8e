import pytest
import torch
from torch import Tensor

from dirotq.kernels.formats.pack_int4 import pack_int4
from dirotq.kernels.formats.quantize_weight import dequantize_weight
from dirotq.kernels.w4a4_linear import w4a4_linear

M, N, K, R = 5, 6, 32, 4


def operands(act_groups: int, weight_groups: int, qmax: int = 7) -> tuple[Tensor, ...]:
    codes = torch.randint(-qmax, qmax + 1, (M, K), dtype=torch.int8)
    scale = torch.rand(M, act_groups) + 0.1
    qweight = torch.randint(-7, 8, (N, K), dtype=torch.int8)
    wscale = (torch.rand(N, weight_groups) + 0.1).to(torch.bfloat16)
    return codes, scale, qweight, wscale


def exact(codes, scale, qweight, wscale, c=None, wp=None, bias=None) -> Tensor:
    """Dequantize, then multiply, everything in float64."""
    x = dequantize_weight(codes, scale, torch.float64)
    y = x @ dequantize_weight(qweight, wscale, torch.float64).T
    y = y if c is None else y + c.double() @ wp.double().T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("act_groups", [1, 4])
@pytest.mark.parametrize("weight_groups", [1, 4])
@pytest.mark.parametrize("qmax", [7, 112, 127])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "protected-and-bias"])
def test_against_float64(act_groups, weight_groups, qmax, extras):
    codes, scale, qweight, wscale = operands(act_groups, weight_groups, qmax)
    more = (torch.randn(M, R), torch.randn(N, R).bfloat16(), torch.randn(N).bfloat16())
    c, wp, bias = more if extras else (None, None, None)
    got = w4a4_linear(codes, scale, c, pack_int4(qweight), wscale, wp, bias)
    want = exact(codes, scale, qweight, wscale, c, wp, bias)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_bias_without_protected_branch():
    codes, scale, qweight, wscale = operands(1, 1)
    bias = torch.randn(N).bfloat16()
    plain = w4a4_linear(codes, scale, None, pack_int4(qweight), wscale, None, None)
    biased = w4a4_linear(codes, scale, None, pack_int4(qweight), wscale, None, bias)
    torch.testing.assert_close(biased - plain, bias.float().expand(M, N), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pattern", ["same sign", "random"])
def test_integer_main_term_is_exact_at_the_largest_width(pattern):
    wide = 15360
    sign_x, sign_w = torch.ones(3, wide), torch.ones(4, wide)
    if pattern == "random":
        sign_x, sign_w = torch.sign(torch.randn(3, wide)), torch.sign(torch.randn(4, wide))
        sign_x[:, ::3] /= 16  # odd codes, so that the sums are not multiples of 16
    codes, qweight = (112 * sign_x).to(torch.int8), (7 * sign_w).to(torch.int8)
    ones = torch.ones(3, 1), torch.ones(4, 1, dtype=torch.bfloat16)
    got = w4a4_linear(codes, ones[0], None, pack_int4(qweight), ones[1], None, None)
    assert torch.equal(got.long(), codes.long() @ qweight.long().T)
    assert torch.equal(got, got.round())


def test_rows_of_the_weight_give_columns_of_the_output():
    codes, scale, qweight, wscale = operands(1, 1)
    packed = pack_int4(qweight)
    whole = w4a4_linear(codes, scale, None, packed, wscale, None, None)
    part = w4a4_linear(codes, scale, None, packed[2:5], wscale[2:5], None, None)
    assert torch.equal(part, whole[:, 2:5])
