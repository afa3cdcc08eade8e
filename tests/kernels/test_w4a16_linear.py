import pytest
import torch

from dirotq.kernels.formats.pack_int4 import pack_int4
from dirotq.kernels.formats.quantize_weight import dequantize_weight
from dirotq.kernels.w4a16_linear import w4a16_linear


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3])
def test_against_float64(groups, bias, dtype, rows):
    z = torch.randn(rows, 32).to(dtype)
    qweight = torch.randint(-7, 8, (6, 32), dtype=torch.int8)
    wscale = (torch.rand(6, groups) + 0.1).to(torch.bfloat16)
    beta = torch.randn(6).bfloat16() if bias else None
    got = w4a16_linear(z, pack_int4(qweight), wscale, beta)
    want = z.double() @ dequantize_weight(qweight, wscale, torch.float64).T
    want = want if beta is None else want + beta.double()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


def test_activations_are_not_rounded():
    z = torch.tensor([[1.0, 1e-3]])
    codes = torch.tensor([[1, 1]], dtype=torch.int8)
    got = w4a16_linear(z, pack_int4(codes), torch.ones(1, 1, dtype=torch.bfloat16), None)
    assert got.item() == pytest.approx(1.001, rel=1e-6)
