"""The Triton ``norm_rope`` against its specification; interpreted where there is no GPU.

Inputs are fp16, as elsewhere: the interpreter computes bf16 wrongly. The rule: against float64, an
error below twice that of plain torch in the same dtype; and half a unit in the last place at most.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from builds.norm_rope import builds

from dirotq.kernels.norm_rope import reference as specification
from dirotq.kernels.norm_rope.kernel import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
HALF = torch.float16
PAIRS = pytest.mark.parametrize("interleaved", [True, False], ids=["neighbours", "halves"])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def part(
    batch: int, tokens: int, heads: int, dim: int, *, seed: int, beside: int = 0, dtype=HALF
) -> Tensor:
    """Rows of a size of their own inside of a wider linear's; ``beside`` more columns."""
    x = normal(batch, tokens, heads * dim, seed=seed)
    x *= torch.exp(normal(batch, tokens, 1, seed=seed + 1))
    wide = x.new_full((batch, tokens, 3 * heads * dim + beside), torch.nan, dtype=dtype)
    wide[..., heads * dim : 2 * heads * dim] = x
    return wide[..., heads * dim : 2 * heads * dim].unflatten(-1, (heads, dim))


def weight(count: int, seed: int = 3, dtype=HALF) -> Tensor:
    return (1 + 0.3 * normal(count, seed=seed)).to(dtype)


def tables(batch: int, tokens: int, count: int) -> tuple[Tensor, Tensor]:
    """No two numbers are alike, those of a pair neither."""
    return normal(batch, tokens, 1, count, seed=7), normal(batch, tokens, 1, count, seed=8)


def double(some: list) -> list:
    return [None if t is None else t.double() for t in some]


def assert_close(parts, weights, eps, cos, sin, interleaved=True):
    got = launch(parts, weights, eps, cos, sin, interleaved)
    plain = specification.norm_rope(parts, weights, eps, cos, sin, interleaved)
    true = specification.norm_rope(
        double(parts), double(weights), eps, double(cos), double(sin), interleaved
    )
    assert got.dtype == parts[0].dtype and got.shape == true.shape and got.is_contiguous()
    error, usual = (got - true).abs(), (plain - true).abs()
    assert error.square().mean().sqrt() <= 2 * usual.square().mean().sqrt()
    # One rounding, at the end: never further away than half a unit, but for float32's own.
    limits = torch.finfo(got.dtype)
    last = true.abs().clamp(min=limits.smallest_normal) * limits.eps
    own = 8 * torch.finfo(torch.float32).eps * true.abs().amax((-2, -1), keepdim=True)
    assert (error <= 0.51 * last + own).all()
    return got


@PAIRS
@pytest.mark.parametrize("tokens", [(21,), (1,), (19, 37), (3, 1)], ids=str)
@pytest.mark.parametrize("dim", [32, 72, 128])
def test_is_nearer_to_float64_than_twice_plain_torch(dim, tokens, interleaved, empty_is):
    parts = [part(1, t, 2, dim, seed=10 * i) for i, t in enumerate(tokens)]
    cos, sin = zip(*(tables(1, t, dim // 2) for t in tokens))
    weights = [weight(dim, i) for i in range(len(tokens))]
    with empty_is(255):
        assert_close(parts, weights, EPS, list(cos), list(sin), interleaved)


@PAIRS
@pytest.mark.parametrize("count", [64, 32])
@pytest.mark.parametrize("batch", [1, 3])
def test_tables_of_channels_and_of_pairs_of_all_images_and_of_each(batch, count, interleaved):
    cos, sin = tables(batch, 33, count)
    assert_close([part(3, 33, 3, 64, seed=1, beside=24)], [None], EPS, [cos], [sin], interleaved)


@PAIRS
@pytest.mark.parametrize("heads", [1, 4, 5, 9])
def test_heads_of_several_programs(heads, interleaved):
    cos, sin = tables(1, 6, 32)
    assert_close([part(1, 6, heads, 32, seed=1)], [weight(32)], EPS, [cos], [sin], interleaved)


@PAIRS
@pytest.mark.parametrize("heads", [2, 5])
def test_a_norm_over_all_heads(heads, interleaved):
    cos, sin = tables(2, 11, 16)
    x = part(2, 11, heads, 32, seed=1)
    assert_close([x], [weight(32 * heads)], EPS, [cos], [sin], interleaved)


@PAIRS
@pytest.mark.parametrize("dim", [16, 256, 1200])
def test_narrow_and_wide_heads(dim, interleaved):
    cos, sin = tables(1, 5, dim)
    assert_close([part(1, 5, 1, dim, seed=1)], [weight(dim)], EPS, [cos], [sin], interleaved)


@PAIRS
def test_either_step_alone(interleaved):
    x, (cos, sin) = part(2, 9, 2, 64, seed=1), tables(1, 9, 64)
    assert_close([x], [weight(64)], EPS, [None], [None], interleaved)
    assert_close([x], [None], None, [cos], [sin], interleaved)


def test_parts_with_and_without_what_others_have():
    parts = [part(2, t, 2, 32, seed=t) for t in (4, 9)]
    cos, sin = tables(1, 9, 32)
    assert_close(parts, [None, weight(32)], EPS, [None, cos], [None, sin])


@pytest.mark.parametrize("tokens", [13, 1])
def test_one_table_for_all_parts(tokens):
    parts = [part(2, t, 2, 32, seed=t) for t in (4, 9)]
    cos, sin = tables(1, tokens, 32)
    assert_close(parts, [weight(32), None], EPS, [cos], [sin])


def test_tables_that_lie_anywhere():
    """The real and imaginary numbers of one tensor; every second number; one row for all."""
    x, pairs = part(2, 9, 2, 32, seed=1), normal(1, 9, 1, 16, 2, seed=2)
    assert_close([x], [None], EPS, [pairs[..., 0]], [pairs[..., 1]])
    cos, sin = tables(2, 9, 32)
    assert_close([x], [None], EPS, [cos[..., 0::2]], [sin[..., 1::2]])
    assert_close([x], [None], EPS, [cos[..., :16]], [sin[..., 1::2].contiguous()])
    assert_close([x], [None], EPS, [cos[:1, :1]], [sin[:1, :1]])


def test_heads_before_tokens_and_channels_apart():
    x = part(2, 9, 3, 32, seed=1).transpose(1, 2).contiguous().transpose(1, 2)
    cos, sin = tables(1, 9, 32)
    assert_close([x], [weight(32)], EPS, [cos], [sin])
    assert_close([part(2, 9, 32, 32, seed=1).transpose(2, 3)], [weight(32)], EPS, [cos], [sin])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tables_and_weights_of_other_dtypes(dtype):
    cos, sin = (t.to(dtype) for t in tables(1, 9, 32))
    assert_close([part(1, 9, 2, 32, seed=1)], [weight(32, dtype=torch.float32)], EPS, [cos], [sin])


def test_zeros_stay_and_nothing_spreads():
    x = part(1, 6, 1, 32, seed=0)
    x[0, 1] = 0
    cos, sin = tables(1, 6, 32)
    assert not launch([x], [None], EPS, [cos], [sin], True)[0, 1].any()
    x[0, 4, 0, 3] = torch.nan
    got = launch([x], [None], EPS, [cos], [sin], True)
    assert got[0, 4].isnan().all() and got[0, [0, 1, 2, 3, 5]].isfinite().all()


def test_no_tokens():
    empty = part(2, 0, 2, 32, seed=0)
    assert launch([empty], [None], EPS, [None], [None], True).shape == (2, 0, 2, 32)
    assert_close([empty, part(2, 4, 2, 32, seed=0)], [None] * 2, EPS, [None] * 2, [None] * 2)


def test_eps_counts():
    assert_close([part(1, 4, 2, 32, seed=5)], [None], 0.5, [None], [None])


def test_builds_name_every_argument():
    for build in builds():
        assert set(build.signature) | set(build.constants) == set(build.kernel.arg_names)
        assert not set(build.signature) & set(build.constants)
    names = [(build.name, chip) for build in builds() for chip in build.chips]
    assert len(set(names)) == len(names)
