"""x + gate * y: the kernel (interpreted where there is no GPU) against the specification."""

import pytest
import torch
from formats import DEVICE

pytest.importorskip("triton")

from dirotq.kernels.gated_residual import gated_residual, reference
from dirotq.kernels.gated_residual.kernel import launch


@pytest.mark.parametrize("shape", [(1, 7, 96), (3, 5, 1152), (2, 1, 2048)])
def test_as_good_as_plain_torch(shape, empty_is):
    g = torch.Generator().manual_seed(0)
    b, t, d = shape
    x = torch.randn(b, t + 4, d, generator=g).half().to(DEVICE)[:, 2 : 2 + t]
    y = torch.randn(b, t, d + 16, generator=g).half().to(DEVICE)[..., 8 : 8 + d]
    gate = torch.randn(b, 3 * d, generator=g).half().to(DEVICE)[:, d : 2 * d]
    want = reference.gated_residual(x.double(), gate.double(), y.double())
    with empty_is(255):
        got = launch(x, gate, y)
    assert got.is_contiguous()
    plain = reference.gated_residual(x, gate, y)
    assert (got.double() - want).norm() <= (plain.double() - want).norm() + 1e-9


def test_other_dtypes_take_the_specification():
    x, gate = torch.randn(2, 3, 8), torch.randn(2, 8)
    assert torch.equal(gated_residual(x, gate, x), x + gate[:, None] * x)
