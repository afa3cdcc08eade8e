"""``norm_rope`` in FP8: what its specification promises, and the Triton kernel against it.

The kernel's inputs are fp16: the interpreter has no bf16.
"""

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dirotq.kernels.formats.hadamard import hadamard_matrix
from dirotq.kernels.norm_rope import reference, why_not_codes
from dirotq.kernels.norm_rope.into_fp8 import launch_codes
from dirotq.kernels.norm_rope.reference import codes, norm_rope, rotated

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHOWING = (codes, launch_codes) if DEVICE == "cuda" else (codes,)
"""The interpreter's FP8 has no NaN."""
EPS = 1e-6
PAIRS = pytest.mark.parametrize("interleaved", [True, False], ids=["neighbours", "halves"])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def part(batch: int, tokens: int, heads: int, dim: int, *, seed: int = 0) -> Tensor:
    """Rows of a size of their own inside of a wider linear's."""
    x = normal(batch, tokens, heads * dim, seed=seed)
    x *= torch.exp(normal(batch, tokens, 1, seed=seed + 1))
    wide = x.new_full((batch, tokens, 3 * heads * dim), torch.nan, dtype=torch.float16)
    wide[..., heads * dim : 2 * heads * dim] = x
    return wide[..., heads * dim : 2 * heads * dim].unflatten(-1, (heads, dim))


def weight(count: int, seed: int = 3) -> Tensor:
    return (1 + 0.3 * normal(count, seed=seed)).half()


def tables(batch: int, tokens: int, count: int) -> tuple[Tensor, Tensor]:
    """Of rotations, but that the numbers of a pair differ where it has two."""
    angle = normal(batch, tokens, 1, count, seed=7)
    return angle.cos(), angle.sin()


def back(found: tuple[Tensor, Tensor]) -> Tensor:
    numbers, scale_BH = found
    return numbers.double() * scale_BH.double()[:, None, :, None]


@PAIRS
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_the_rotation_is_the_hadamard_matrix_of_a_head(dim, interleaved):
    x = normal(2, 3, 2, dim, seed=0).double()
    h = hadamard_matrix(dim, x.dtype, x.device)
    torch.testing.assert_close(rotated(x, interleaved), x @ h)


@PAIRS
@pytest.mark.parametrize("dim", [96, 80, 48])
def test_the_rotation_of_other_heads_keeps_products(dim, interleaved):
    x = normal(1, 6, 1, dim, seed=0).double()
    y = rotated(x, interleaved)
    assert not torch.allclose(x, y)
    torch.testing.assert_close(y[0, :, 0] @ y[0, :, 0].T, x[0, :, 0] @ x[0, :, 0].T)


@PAIRS
def test_codes_times_scales_are_what_is_normed_and_turned(interleaved):
    x, (cos, sin) = part(2, 40, 3, 64), tables(1, 40, 64)
    arguments = [weight(64)], EPS, [cos], [sin], interleaved
    want = rotated(norm_rope([x.double()], *arguments), interleaved)
    error = back(codes([x], *arguments)) - want
    assert (error.abs() <= want.abs() / 16 + want.abs().amax() * 1e-4).all()


@pytest.mark.parametrize("across", [False, True], ids=["head", "all-heads"])
def test_nothing_passes_the_range_whatever_the_numbers_are(across):
    """All that a row has in one place, where the weight is largest; tables that lengthen."""
    x = torch.zeros(1, 8, 3, 32, dtype=torch.float16, device=DEVICE)
    x[0, :, 1, 5] = 1000
    w = torch.ones(96 if across else 32, device=DEVICE)
    w[37 if across else 5] = 100
    cos = torch.full((1, 1, 1, 16), 2.8, device=DEVICE)
    found, scale = codes([x], [w], EPS, [cos], [torch.zeros_like(cos)], True)
    assert found.float().isfinite().all() and scale.log2().frac().eq(0).all()
    length = 2.8 * 100 * math.sqrt(96 if across else 32)
    got = back((found, scale)).norm(dim=-1)[0, :, 1]
    torch.testing.assert_close(got, torch.full_like(got, length), rtol=0.05, atol=0)


def assert_codes(parts, weights, eps, cos, sin, interleaved=True) -> Tensor:
    arguments = parts, weights, eps, cos, sin, interleaved
    assert why_not_codes(weights, eps, parts[0].shape[-1]) is None
    (got, scale), (want, want_scale) = launch_codes(*arguments), codes(*arguments)
    assert got.dtype == torch.float8_e4m3fn and got.shape == want.shape and got.is_contiguous()
    assert torch.equal(scale, want_scale)
    off, size = (got.float() - want.float()).abs(), want.float().abs()
    # 16 bits between the rotations, and float32's own sums: what stands at a tie falls anywhere.
    assert (off != 0).sum() <= 3 + 0.02 * off.numel()
    assert (off <= 0.13 * size + 0.02).all()
    return got


@PAIRS
@pytest.mark.parametrize("tokens", [(21,), (1,), (19, 37)], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_the_kernel_is_the_specification(dim, tokens, interleaved, empty_is):
    parts = [part(1, t, 2, dim, seed=10 * i) for i, t in enumerate(tokens)]
    cos, sin = zip(*(tables(1, t, dim // 2) for t in tokens))
    weights = [weight(dim, i) * (1 + 9 * i) for i in range(len(tokens))]
    with empty_is(255):
        assert_codes(parts, weights, EPS, list(cos), list(sin), interleaved)


@PAIRS
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("count", [64, 32])
def test_tables_of_channels_and_of_pairs_of_all_images_and_of_each(count, batch, interleaved):
    cos, sin = tables(batch, 33, count)
    assert_codes([part(3, 33, 3, 64)], [None], EPS, [cos], [sin], interleaved)


@pytest.mark.parametrize("heads", [1, 6, 7])
def test_heads_of_several_programs(heads):
    cos, sin = tables(1, 6, 32)
    assert_codes([part(1, 6, heads, 32)], [weight(32)], EPS, [cos], [sin])


@PAIRS
@pytest.mark.parametrize("heads", [2, 7])
def test_a_norm_over_all_heads(heads, interleaved):
    cos, sin = tables(2, 11, 16)
    parts = [part(2, 11, heads, 32)]
    assert_codes(parts, [weight(32 * heads)], EPS, [cos], [sin], interleaved)
    halves = [parts[0][:, :4], parts[0][:, 4:]]
    weights = [weight(32 * heads, i) for i in range(2)]
    assert_codes(halves, weights, EPS, [cos], [sin], interleaved)


@PAIRS
def test_a_norm_without_rotation(interleaved):
    none = [None]
    assert_codes([part(2, 9, 2, 64)], [weight(64)], EPS, none, none, interleaved)
    parts = [part(2, t, 2, 64, seed=t) for t in (4, 0)]
    assert_codes(parts, [weight(64)] * 2, EPS, none * 2, none * 2, interleaved)


def test_zeros_stay_and_nothing_spreads():
    x = part(1, 6, 1, 32)
    x[0, 1] = 0
    cos, sin = tables(1, 6, 32)
    assert not launch_codes([x], [None], EPS, [cos], [sin], True)[0][0, 1].float().any()
    x[0, 4, 0, 3] = torch.nan
    for make in SHOWING:
        got = make([x], [None], EPS, [cos], [sin], True)[0].float()
        assert got[0, 4].isnan().all() and got[0, [0, 1, 2, 3, 5]].isfinite().all()


@PAIRS
@pytest.mark.parametrize("count", [16, 32])
def test_tables_that_lengthen_too_much_show(count, interleaved):
    cos, sin = tables(1, 6, count)
    cos[0, 2] *= 10
    for make in SHOWING:
        got = make([part(1, 6, 1, 32)], [None], EPS, [cos], [sin], interleaved)[0].float()
        assert got[0, 2].isnan().all() and got[0, [0, 1, 3, 4, 5]].isfinite().all()


def test_a_weight_of_zeros():
    found, scale = launch_codes([part(1, 6, 2, 32)], [weight(32) * 0], EPS, [None], [None], True)
    assert not found.float().any() and (scale > 0).all()


W = torch.ones(64)


@pytest.mark.parametrize(
    ("weights", "eps", "dim", "said"),
    [
        ([W], EPS, 64, None),
        ([W, W], EPS, 32, None),
        ([None, None], EPS, 128, None),
        ([None], None, 64, "not normed"),
        ([W] * 3, EPS, 64, "more than two"),
        ([W, None], EPS, 64, "differ in size"),
        ([W], EPS, 72, "72 channels"),
        ([W], EPS, 16, "16 channels"),
    ],
)
def test_what_can_be_written_without_a_look(weights, eps, dim, said):
    reason = why_not_codes(weights, eps, dim)
    assert reason is None if said is None else said in reason


def test_room_is_as_said():
    assert reference.longest(64, 4) == reference.ROOM * 16
