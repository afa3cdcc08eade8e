"""Attention on a real GPU: exact against float64, 8 bits against their specifications."""

import pytest
import torch
from attending import attention
from torch import Tensor

pytest.importorskip("triton")

from dirotq.kernels.attention import engines, flash3, reference, why_not
from dirotq.kernels.attention.kernel import launch, quantized, usual
from dirotq.kernels.attention.normed import OPERATOR as NORMED
from dirotq.kernels.attention.redirect import OPERATOR
from dirotq.kernels.chip import capability
from dirotq.kernels.fp8_qkv import reference as fp8
from dirotq.kernels.fp8_qkv.kernel import launch as fp8_codes
from dirotq.kernels.fp8_qkv.kernel import launch_values
from dirotq.kernels.norm_rope import norm_rope
from dirotq.runtime.passes import rewritten

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


@EIGHT
def test_fp8_codes_of_v_alone(empty_is):
    views = torch.stack(qkv(2, 700, 700, 5, 96), 2).unbind(2)
    want = fp8_codes(*views)
    with empty_is(255):
        codes, scale = launch_values(views[2])
    assert torch.equal(scale, want.v_scale_BH)
    assert torch.equal(codes.view(torch.uint8), want.v_BSHd.view(torch.uint8))


def norms(tokens: int, d: int, *, across: bool = False) -> list:
    """Weight, eps, cos and sin of one part, as operators take them."""
    weight = (1 + 0.3 * torch.randn(4 * d if across else d, device=DEVICE)).bfloat16()
    angle = torch.randn(1, tokens, 1, d // 2, device=DEVICE)
    return [[weight], 1e-6, [angle.cos()], [angle.sin()]]


@FLASH3
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("tokens", "d"), [(engines.LONG, 128), (engines.LONG + 77, 64), (600, 64)])
def test_normed_turned_and_attended(tokens, d, across, empty_is):
    q, k, _ = qkv(1, tokens, tokens, 4, d)
    v = torch.randn_like(k)  # without an offset, which would hide the rest
    of_q, of_k = (norms(tokens, d, across=across) for _ in range(2))
    with empty_is(255):
        got = NORMED([q], *of_q, [k], *of_k, True, v.transpose(1, 2), None).transpose(1, 2)
    q, k = norm_rope([q], *of_q, True), norm_rope([k], *of_k, True)
    want, spec = wanted(q, k, v), fp8.attention(q, k, v, scale=d**-0.5)
    assert got.dtype == v.dtype and got.is_contiguous()
    assert error(got, want) < 2 * error(spec, want) + 1e-2
    exact = error(got, attention(q, k, v).double()) < 1e-3
    assert exact == (tokens < engines.LONG)


@FLASH3
@torch.no_grad()
def test_normed_attention_out_of_inductor_and_in_a_graph():
    tokens, d = engines.LONG, 128
    q, k, _ = (t.flatten(2) for t in qkv(1, tokens, tokens, 4, d))
    v = torch.randn_like(k)
    weight, (cos, sin) = norms(tokens, d)[0][0], (t[0] for t in norms(tokens, d)[2:])

    def turned(x, weight):
        x = torch.nn.functional.rms_norm(x.unflatten(-1, (-1, d)), (d,), weight, 1e-6)
        first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        pairs = [first * cos - second * sin, second * cos + first * sin]
        return torch.stack(pairs, -1).flatten(-2).type_as(x)

    def block(q, k, v):
        q, k, v = turned(2 * q, weight), turned(k + 1, weight), v.unflatten(-1, (-1, d))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return 2 * y.transpose(1, 2).flatten(2)

    counts = []

    def backend(module, example_inputs):
        rewritten(module, "fp8")
        counts.append(len(module.graph.find_nodes(op="call_function", target=NORMED)))
        return torch._inductor.compile(module, list(example_inputs))

    torch._dynamo.reset()
    call = torch.compile(block, backend=backend, fullgraph=True)
    want, got = block(q, k, v), call(q, k, v)
    assert counts == [1]
    assert 1e-2 < error(got, want.double()) < 0.12
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = call(q, k, v)
    graph.replay()
    torch.cuda.synchronize()
    assert error(again, got.double()) < 1e-2
