"""Attention on a real GPU: exact against float64, 8 bits against their specification."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dirotq.kernels.attention import attention, reference, why_not
from dirotq.kernels.attention.kernel import launch, quantized, usual
from dirotq.kernels.chip import capability

DEVICE = torch.device("cuda")
CHIP = capability(DEVICE) if torch.cuda.is_available() else 90
EIGHT = pytest.mark.skipif(bool(why_not(CHIP)), reason="no 8-bit attention on this GPU")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("full_float32"),
]

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
SHAPES = pytest.mark.parametrize(
    ("B", "T", "S", "H", "d"),
    [
        (1, 1536, 1536, 24, 128),
        (2, 512, 1024, 4, 64),
        (1, 1000, 1000, 16, 72),
        (2, 77, 333, 3, 128),
        (1, 4096, 300, 2, 32),
        (1, 1, 1, 1, 96),
    ],
)


def qkv(B: int, T: int, S: int, H: int, d: int, dtype=torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(T + S + d)
    q, k, v = (torch.randn(B, n, H, d, device=DEVICE) for n in (T, S, S))
    k += 3 * torch.randn(1, 1, H, d, device=DEVICE)
    v += 0.3 * torch.randn(1, 1, H, d, device=DEVICE)
    return [t.to(dtype) for t in (q, k, v)]


def wanted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@HALVES
@SHAPES
def test_exact(B, T, S, H, d, dtype):
    q, k, v = qkv(B, T, S, H, d, dtype)
    got = attention(q, k, v)
    assert got.dtype == dtype
    assert error(got, wanted(q, k, v)) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("mode", ["exact", "fp8"])
def test_masks_are_exact(mode):
    q, k, v = qkv(2, 100, 130, 4, 64)
    mask = torch.rand(2, 1, 100, 130, device=DEVICE) > 0.3
    logits = (q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1)) * 64**-0.5
    p = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    want = (p @ v.double().transpose(1, 2)).transpose(1, 2)
    assert error(attention(q, k, v, mode=mode, mask=mask), want) < 1e-2


@pytest.mark.parametrize("mode", ["exact", pytest.param("fp8", marks=EIGHT)])
def test_views_of_a_fused_projection(mode):
    q, k, v = qkv(1, 640, 640, 8, 128)
    views = torch.stack([q, k, v], 2).unbind(2)
    got = attention(*views, mode=mode)
    assert error(got, attention(q, k, v, mode=mode).double()) < 5e-3
    assert got.flatten(2).data_ptr() == got.data_ptr()


@EIGHT
@HALVES
@SHAPES
def test_codes(B, T, S, H, d, dtype, empty_is):
    q, k, v = qkv(B, T, S, H, d, dtype)
    want = reference.quantize(q, k, v, scale=0.1)
    with empty_is(255):
        got = quantized(q, k, v, scale=0.1)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(
        got.q_scale_LT.unflatten(0, (B, H))[:, :, :T], want.q_scale_BHT, **close
    )
    torch.testing.assert_close(got.k_scale_LN.unflatten(0, (B, H)), want.k_scale_BHN, **close)
    off = got.k_LSd.unflatten(0, (B, H))[:, :, :S, :d].int() - want.k_BHSd.int()
    # A mean of one token is the token; what its subtraction leaves is rounding.
    assert S == 1 or (off.abs().max() <= 1 and off.ne(0).float().mean() < 1e-2)


@EIGHT
@HALVES
@SHAPES
def test_codes_and_product(B, T, S, H, d, dtype, empty_is):
    q, k, v = qkv(B, T, S, H, d, dtype)
    want = wanted(q, k, v)
    with empty_is(255):
        got = launch(q, k, v, scale=d**-0.5)
    assert got.isfinite().all()
    codes = reference.quantize(q, k, v, scale=d**-0.5)
    spec = reference.attend(codes, block=usual(CHIP).bn).transpose(1, 2)
    # What Hopper's own FP8 sums lose comes on top.
    assert error(got, spec.double()) < 2e-2
    assert error(got, want) < 2 * error(spec, want) + 1e-2


@EIGHT
def test_a_bad_number_shows_and_stays_in_its_head():
    q, k, v = qkv(1, 300, 300, 3, 64)
    before = attention(q, k, v, mode="fp8")
    k[0, 7, 1, 3] = torch.nan
    got = attention(q, k, v, mode="fp8")
    assert torch.equal(got[:, :, ::2], before[:, :, ::2])
    assert not got[:, :, 1].isfinite().any()
