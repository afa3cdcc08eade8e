"""Attention on a real GPU: exact against float64, 8 bits against their specifications."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dirotq.kernels.attention import attention, engines, flash3, reference, why_not
from dirotq.kernels.attention.kernel import launch, quantized, usual
from dirotq.kernels.attention.redirect import OPERATOR
from dirotq.kernels.chip import capability
from dirotq.kernels.fp8_qkv import reference as fp8
from dirotq.kernels.fp8_qkv.kernel import launch as fp8_codes

DEVICE = torch.device("cuda")
CHIP = capability(DEVICE) if torch.cuda.is_available() else 90
EIGHT = pytest.mark.skipif(bool(why_not(CHIP)), reason="no 8-bit attention on this GPU")
NO_FLASH3 = flash3.why_not(CHIP, 128, torch.bfloat16, fp8=True)
FLASH3 = pytest.mark.skipif(bool(NO_FLASH3), reason=str(NO_FLASH3))

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


def int8(*qkv: Tensor) -> Tensor:
    return launch(*qkv, scale=qkv[0].shape[-1] ** -0.5)


@pytest.mark.parametrize("compute", [attention, pytest.param(int8, marks=EIGHT)])
def test_views_of_a_fused_projection(compute):
    q, k, v = qkv(1, 640, 640, 8, 128)
    views = torch.stack([q, k, v], 2).unbind(2)
    got = compute(*views)
    assert error(got, compute(q, k, v).double()) < 5e-3
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
    before = int8(q, k, v)
    k[0, 7, 1, 3] = torch.nan
    got = int8(q, k, v)
    assert torch.equal(got[:, :, ::2], before[:, :, ::2])
    assert not got[:, :, 1].isfinite().any()


WIDTHS_OF_16 = [
    (1, 1536, 1536, 24, 128),
    (2, 512, 1024, 4, 64),
    (1, 1000, 1000, 16, 96),
    (2, 77, 333, 3, 128),
    (1, 4096, 300, 2, 48),
]


@EIGHT
@HALVES
@pytest.mark.parametrize(("B", "T", "S", "H", "d"), WIDTHS_OF_16)
def test_fp8_codes(B, T, S, H, d, dtype, empty_is):
    q, k, v = qkv(B, T, S, H, d, dtype)
    want = fp8.quantize(q, k, v)
    with empty_is(255):
        got = fp8_codes(q, k, v)
    for name in ("q_scale_BH", "k_scale_BH", "v_scale_BH"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-4, atol=0)
    for name in ("q_BTHd", "k_BSHd", "v_BSHd"):
        ours, theirs = (getattr(codes, name).float() for codes in (got, want))
        off = ours - theirs
        assert off.ne(0).float().mean() < 1e-2, name
        assert (off.abs() <= 0.13 * theirs.abs() + 0.01).all(), name


@FLASH3
@pytest.mark.parametrize(("B", "T", "S", "H", "d"), WIDTHS_OF_16)
def test_flash3_in_fp8(B, T, S, H, d, empty_is):
    q, k, v = qkv(B, T, S, H, d)
    want, spec = wanted(q, k, v), fp8.attention(q, k, v, scale=d**-0.5)
    with empty_is(255):
        got = flash3.fp8(fp8_codes(q, k, v), scale=d**-0.5)
    assert got.dtype == q.dtype
    assert got.is_contiguous()
    assert error(got, spec.double()) < 3e-2
    assert error(got, want) < 2 * error(spec, want) + 1e-2


@FLASH3
@pytest.mark.parametrize("shape", [*WIDTHS_OF_16, (2, 300, 300, 4, 72)])
def test_flash3_exact(shape):
    q, k, v = qkv(*shape)
    views = torch.stack([k, v], 2).unbind(2)
    got = flash3.exact(q, *views, scale=shape[-1] ** -0.5)
    assert error(got, wanted(q, k, v)) < 1e-2
    assert got.is_contiguous()


@pytest.mark.parametrize("mode", ["exact", "fp8"])
@pytest.mark.parametrize("tokens", [512, engines.LONG])
def test_the_operator_in_a_graph_and_a_compiler(tokens, mode):
    q, k, v = (t.transpose(1, 2) for t in qkv(1, tokens, tokens, 2, 64))
    out: list[Tensor] = []

    def call():
        return OPERATOR(q, k, v, None, None, mode)

    want = call()
    assert want.transpose(1, 2).flatten(2).data_ptr() == want.data_ptr()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.append(call())
    graph.replay()
    assert error(out[0], want.double()) < 5e-3
    with torch.no_grad():
        compiled = torch.compile(
            lambda q, k, v: OPERATOR(q * 1, k, v, None, None, mode).transpose(1, 2).flatten(2) + 1
        )
        got = compiled(q, k, v)
    assert error(got - 1, want.transpose(1, 2).flatten(2).double()) < 1e-2


@FLASH3
def test_a_bad_number_shows_and_stays_in_its_head_in_fp8():
    q, k, v = qkv(1, 300, 300, 3, 64)
    before = flash3.fp8(fp8_codes(q, k, v), scale=0.125)
    k[0, 7, 1, 3] = torch.nan
    got = flash3.fp8(fp8_codes(q, k, v), scale=0.125)
    assert torch.equal(got[:, :, ::2], before[:, :, ::2])
    assert not got[:, :, 1].isfinite().any()


@FLASH3
def test_a_head_of_zeros_in_fp8():
    q, k, v = qkv(1, 300, 300, 3, 64)
    q[:, :, 1] = 0
    got = flash3.fp8(fp8_codes(q, k, v), scale=0.125)
    mean = v[:, :, 1].float().mean(1, keepdim=True).expand(1, 300, 64)
    assert error(got[:, :, 1], mean.double()) < 0.1
