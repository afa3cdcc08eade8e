import pytest
import torch

from dirotq.kernels.full_float32 import full_float32


@pytest.fixture(params=["highest", "high", "medium"])
def allowed(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def test_no_tf32_inside_and_as_before_outside(allowed):
    with full_float32():
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == allowed


def test_as_before_after_an_error(allowed):
    with pytest.raises(ZeroDivisionError), full_float32():
        1 / 0  # noqa: B018
    assert torch.get_float32_matmul_precision() == allowed
