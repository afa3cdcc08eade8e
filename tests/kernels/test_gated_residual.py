"""x + gate * y: the kernel (interpreted where there is no GPU) against the specification."""

from dataclasses import replace

import pytest
import torch
from formats import DEVICE
from tiny_spec import tiny_spec

pytest.importorskip("triton")

from dirotq.kernels.gated_residual import gated_residual, gated_residual_norm, reference
from dirotq.kernels.gated_residual.kernel import launch, launch_with_norm
from dirotq.kernels.prologue import modulated_norm
from dirotq.kernels.transform_quantize.kernel import launch as transform_quantize


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


@pytest.mark.parametrize("shape", [(1, 7, 96), (3, 5, 1152), (2, 3, 3072)])
def test_with_the_norm_that_follows(shape, empty_is):
    g = torch.Generator().manual_seed(0)
    b, t, d = shape

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).half().to(DEVICE)

    x, y = draw(b, t + 4, d)[:, 2 : 2 + t] + 2, draw(b, t, d + 16)[..., 8 : 8 + d]
    gate, shift, scale = draw(b, 3 * d).chunk(3, dim=1)
    with empty_is(255):
        out, normed, squares = launch_with_norm(x, gate, y, scale, shift, eps=1e-5)
        assert torch.equal(out, launch(x, gate, y))
    prologue = modulated_norm(out, scale, shift, eps=1e-5)
    want = modulated_norm(out.double(), scale.double(), shift.double(), eps=1e-5).value()
    off = (prologue.value().double() - want).norm()
    assert (normed.view(b, t, d).double() - want).norm() <= off + 1e-9
    torch.testing.assert_close(squares, normed.float().square().sum(-1), rtol=1e-5, atol=0)
    known = replace(prologue, known=(normed, squares))
    assert torch.equal(known.value(), normed.view(b, t, d))


def test_codes_of_a_norm_that_was_computed_before():
    spec = tiny_spec(dim=512, block=256, rank=24, act_scale="rms")
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 5, 512, generator=g).half().to(DEVICE) for _ in range(2))
    gate, shift, scale = torch.randn(2, 1536, generator=g).half().to(DEVICE).chunk(3, dim=1)
    basis = torch.linalg.qr(torch.randn(512, 24, generator=g)).Q.bfloat16().to(DEVICE)
    out, *known = launch_with_norm(x, gate, y, scale, shift, eps=1e-6)
    prologue = modulated_norm(out, scale, shift)
    want = transform_quantize(prologue, basis, None, spec, container=torch.int8)
    got = transform_quantize(
        replace(prologue, known=tuple(known)), basis, None, spec, container=torch.int8
    )
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_other_dtypes_take_the_specification():
    x, gate = torch.randn(2, 3, 8), torch.randn(2, 8)
    assert torch.equal(gated_residual(x, gate, x), x + gate[:, None] * x)
    out, prologue = gated_residual_norm(x, gate, x, gate, gate, eps=1e-6)
    assert torch.equal(out, x + gate[:, None] * x)
    assert torch.equal(prologue.value(), modulated_norm(out, gate, gate).value())
