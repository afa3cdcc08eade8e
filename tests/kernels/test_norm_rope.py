"""``norm_rope`` held to diffusers' own pieces and to what rotations keep."""

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from torch import Tensor

from dirotq.kernels import norm_rope as op
from dirotq.kernels.norm_rope import reference, why_not

EPS = 1e-6
norm_rope = torch.ops.dirotq.norm_rope.default


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angles(tokens: int, count: int) -> Tensor:
    return torch.arange(tokens)[:, None] * 100.0 ** -torch.linspace(0, 1, count)


def tables(tokens: int, count: int) -> tuple[Tensor, Tensor]:
    angle = angles(tokens, count)[None, :, None]
    return angle.cos(), angle.sin()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("interleaved", [True, False], ids=["neighbours", "halves"])
def test_is_what_diffusers_computes(dtype, interleaved):
    x, norm = normal(2, 7, 3, 32).to(dtype), RMSNorm(32, eps=EPS)
    norm.weight.copy_(1 + 0.3 * normal(32, seed=1))
    norm.to(dtype)
    cos, sin = (reference.per_channel(t, 32, interleaved) for t in tables(7, 16))
    rope, axis = (cos[0, :, 0], sin[0, :, 0]), -1 if interleaved else -2
    want = apply_rotary_emb(norm(x), rope, use_real_unbind_dim=axis, sequence_dim=1)
    got = norm_rope([x], [norm.weight], EPS, [cos], [sin], interleaved)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, atol=4 * torch.finfo(dtype).eps, rtol=0.02)
    cos, sin = tables(7, 16)
    assert torch.equal(got, norm_rope([x], [norm.weight], EPS, [cos], [sin], interleaved))


def test_complex_numbers_turn_alike():
    x = normal(2, 7, 3, 32)
    turns = torch.polar(torch.ones(7, 16), angles(7, 16))[:, None]
    want = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(3)
    cos, sin = tables(7, 16)
    torch.testing.assert_close(norm_rope([x], [None], None, [cos], [sin], True), want)


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_rotation_keeps_lengths_and_products_of_equal_distance(interleaved):
    cos, sin = tables(9, 16)
    x = normal(1, 1, 1, 32).expand(1, 9, 1, 32)
    turned = norm_rope([x], [None], None, [cos], [sin], interleaved)[0, :, 0].double()
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(turned.norm(dim=-1), x[0, :, 0].double().norm(dim=-1), **close)
    products = turned @ turned.T
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1], **close)


def test_a_weight_of_all_heads_norms_over_all_of_them():
    x, weight = normal(2, 5, 3, 8), normal(24, seed=1)
    want = torch.nn.functional.rms_norm(x.flatten(2), (24,), weight, EPS).view_as(x)
    torch.testing.assert_close(norm_rope([x], [weight], EPS, [None], [None], True), want)


def test_parts_follow_one_another_with_tables_of_their_own_or_of_all():
    x, (cos, sin) = normal(2, 12, 3, 8), tables(12, 4)
    want = norm_rope([x], [None], EPS, [cos], [sin], True)
    parts = list(x.split([5, 7], 1))
    assert torch.equal(want, norm_rope(parts, [None] * 2, EPS, [cos], [sin], True))
    own = [list(t.split([5, 7], 1)) for t in (cos, sin)]
    assert torch.equal(want, norm_rope(parts, [None] * 2, EPS, *own, True))
    plain = norm_rope(parts, [None] * 2, EPS, [cos[:, :5], None], [sin[:, :5], None], True)
    assert torch.equal(plain[:, :5], want[:, :5])
    assert torch.equal(plain[:, 5:], norm_rope(parts[1:], [None], EPS, [None], [None], True))


def test_float64_stays_float64():
    x = normal(1, 5, 2, 8).double()
    cos, sin = (t.double() for t in tables(5, 4))
    wide = norm_rope([x], [None], EPS, [cos], [sin], True)
    assert wide.dtype == torch.float64 and not torch.equal(wide, wide.float().double())


def test_the_operator_is_what_it_says_to_a_compiler():
    x, (cos, sin) = normal(2, 12, 3, 8), tables(12, 4)
    parts = list(x.transpose(1, 2).contiguous().transpose(1, 2).split([5, 7], 1))
    arguments = parts, [normal(8), None], EPS, [cos], [sin], True
    torch.library.opcheck(norm_rope, arguments, test_utils=("test_schema", "test_faketensor"))


X = torch.zeros(2, 5, 3, 8)
TABLE = torch.zeros(1, 5, 1, 8)
USUAL = {"parts": [X], "weights": [None], "eps": EPS, "cos": [None], "sin": [None]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parts": [], "weights": []}, "0 parts, 0 weights"),
        ({"weights": []}, "1 parts, 0 weights"),
        ({"cos": [], "sin": []}, "0 cos"),
        ({"parts": [X] * 3, "weights": [None] * 3, "cos": [None] * 2, "sin": [None] * 2}, "2 cos"),
        ({"cos": [None, None]}, "2 cos, 1 sin"),
        ({"parts": [X[0]]}, r"\(5, 3, 8\).*\[batch, tokens, heads, channels\]"),
        ({"parts": [X[..., :7]]}, "even number of channels"),
        ({"parts": [X, X.half()], "weights": [None] * 2}, "differ in their tokens only"),
        ({"parts": [X, X[:, :, :2]], "weights": [None] * 2}, "differ in their tokens only"),
        ({"weights": [torch.ones(16)]}, "a weight of 16 .* give 8 or 24 numbers"),
        ({"weights": [torch.ones(8)], "eps": None}, "eps None"),
        ({"cos": [TABLE]}, "shapes .* and None"),
        ({"cos": [TABLE], "sin": [TABLE[..., :4]]}, r"8\) and \(1, 5, 1, 4\)"),
        ({"cos": [TABLE[..., :6]], "sin": [TABLE[..., :6]]}, "1, 8 or 4"),
        ({"cos": [TABLE[:, :4]], "sin": [TABLE[:, :4]]}, "for 5 tokens"),
        ({"cos": [TABLE[0]], "sin": [TABLE[0]]}, r"shapes \(5, 1, 8\)"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        norm_rope(**USUAL | change, interleaved=True)


@pytest.mark.parametrize(
    ("dtype", "dim", "chip", "said"),
    [
        (torch.bfloat16, 128, 90, None),
        (torch.float16, 8192, 80, None),
        (torch.bfloat16, 128, 75, "compute capability 7.5"),
        (torch.float32, 128, 90, "float32 is computed as specified"),
        (torch.bfloat16, 260, 90, "heads of 260 channels"),
        (torch.bfloat16, 8200, 90, "heads of 8200 channels"),
        (torch.bfloat16, 128, None, "NVIDIA"),
    ],
)
def test_what_the_kernel_takes(dtype, dim, chip, said, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(op, "capability", lambda device: chip)
    reason = why_not(dtype, torch.device("cuda"), dim)
    assert reason is None if said is None else said in reason


class OnGpu:
    """As much of a CUDA tensor as the choice of a path looks at."""

    is_cuda, device, shape = True, torch.device("cuda"), (2, 5, 3, 8)
    dtype = torch.bfloat16


@pytest.mark.parametrize("reason", [None, "a reason"])
def test_a_gpu_takes_the_kernel_and_says_if_it_cannot(reason, monkeypatch):
    kernel = pytest.importorskip("dirotq.kernels.norm_rope.kernel")
    messages: list[str] = []
    monkeypatch.setattr(op, "why_not", lambda *_: reason)
    monkeypatch.setattr(op, "say_once", lambda message, level: messages.append(message))
    monkeypatch.setattr(kernel, "launch", lambda *_: "kernel")
    monkeypatch.setattr(reference, "check", lambda *_: None)
    monkeypatch.setattr(reference, "norm_rope", lambda *_: "reference")
    got = op.norm_rope([OnGpu()], [None], EPS, [None], [None], True)
    assert got == ("reference" if reason else "kernel")
    assert [message.endswith("a reason") for message in messages] == [True] * bool(reason)
