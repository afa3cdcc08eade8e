"""The Triton ``qk_norm_rope`` against its specification; interpreted where there is no GPU.

Inputs are fp16, as elsewhere: the interpreter computes bf16 wrongly. The rule: against float64, an
error below twice that of plain torch in the same dtype; and half a unit in the last place at most.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from builds.qk_norm_rope import builds

from dirotq.kernels.qk_norm_rope import Part
from dirotq.kernels.qk_norm_rope import reference as specification
from dirotq.kernels.qk_norm_rope.kernel import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
HALF = torch.float16


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def part(
    batch: int,
    tokens: int,
    heads: int,
    dim: int,
    *,
    seed: int,
    beside: int = 0,
    affine: bool = True,
    dtype: torch.dtype = HALF,
) -> Part:
    """Rows of a size of their own, weights around one, ``beside`` more columns in every row."""
    x = normal(batch, tokens, 3 * heads * dim, seed=seed)
    x *= torch.exp(normal(batch, tokens, 1, seed=seed + 1))
    wide = x.new_full((batch, tokens, 3 * heads * dim + beside), torch.nan, dtype=dtype)
    wide[..., : x.shape[-1]] = x
    weights = [(1 + 0.3 * normal(dim, seed=seed + i)).to(dtype) for i in (2, 3)]
    q, k = weights if affine else (None, None)
    return Part(qkv_BTC=wide, q_weight=q, k_weight=k)


def rope_of(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(tokens)[:, None] * 100.0 ** -torch.linspace(0, 1, dim // 2)[None]
    cos, sin = (t.repeat_interleave(2, 1).to(DEVICE) for t in (angle.cos(), angle.sin()))
    return cos, sin


def double(p: Part) -> Part:
    q, k = (None if w is None else w.double() for w in (p.q_weight, p.k_weight))
    return Part(qkv_BTC=p.qkv_BTC.double(), q_weight=q, k_weight=k)


def assert_close(parts, rope, heads: int, eps: float = EPS):
    got = launch(parts, rope, heads=heads, eps=eps)
    plain = specification.qk_norm_rope(parts, rope, heads=heads, eps=eps)
    exact = specification.qk_norm_rope([double(p) for p in parts], rope, heads=heads, eps=eps)
    for mine, theirs, true in zip(got[:2], plain[:2], exact[:2], strict=True):
        assert (
            mine.dtype == parts[0].qkv_BTC.dtype
            and mine.shape == true.shape
            and mine.is_contiguous()
        )
        error, usual = (mine - true).abs(), (theirs - true).abs()
        assert error.square().mean().sqrt() <= 2 * usual.square().mean().sqrt()
        # One rounding, at the end: never further away than half a unit, but for float32's own.
        limits = torch.finfo(mine.dtype)
        last = true.abs().clamp(min=limits.smallest_normal) * limits.eps
        own = 8 * torch.finfo(torch.float32).eps * true.abs().amax(-1, keepdim=True)
        assert (error <= 0.51 * last + own).all()
    assert torch.equal(got[2], plain[2])
    return got


TOKENS = pytest.mark.parametrize("tokens", [(21,), (1,), (19, 37), (3, 1)], ids=str)


@TOKENS
@pytest.mark.parametrize("dim", [32, 64, 72, 128])
def test_is_nearer_to_float64_than_twice_plain_torch(tokens, dim, empty_is):
    parts = [part(1, t, 2, dim, seed=10 * i) for i, t in enumerate(tokens)]
    with empty_is(255):
        got = launch(parts, rope_of(sum(tokens), dim), heads=2, eps=EPS)
    assert all(t.isfinite().all() for t in got)
    assert_close(parts, rope_of(sum(tokens), dim), 2)


@pytest.mark.parametrize("dim", [16, 256])
def test_narrow_and_wide_heads(dim):
    assert_close([part(1, 9, 2, dim, seed=1)], rope_of(9, dim), 2)


@pytest.mark.parametrize("heads", [1, 4, 5, 9])
def test_heads_of_several_programs(heads):
    parts = [part(1, 6, heads, 32, seed=i) for i in (1, 5)]
    assert_close(parts, rope_of(12, 32), heads)


@pytest.mark.parametrize("tokens", [(33,), (40, 70)], ids=str)
def test_a_batch_of_three_in_rows_of_a_wider_linear(tokens):
    parts = [part(3, t, 3, 64, seed=i, beside=24) for i, t in enumerate(tokens)]
    assert_close(parts, rope_of(sum(tokens), 64), 3)


def test_rows_may_lie_anywhere():
    whole = part(5, 40, 2, 32, seed=4, beside=11)
    a = Part(qkv_BTC=whole.qkv_BTC[1:4, 3:20:2, :], q_weight=whole.q_weight)
    b = Part(qkv_BTC=whole.qkv_BTC.transpose(0, 1)[7:10, :4], q_weight=whole.k_weight)
    assert_close([a, b], rope_of(13, 32), 2)
    one = Part(qkv_BTC=whole.qkv_BTC[:1, :5].expand(3, 5, -1), k_weight=whole.k_weight)
    assert_close([one], rope_of(5, 32), 2)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("turned", [True, False], ids=["rope", "no rope"])
@pytest.mark.parametrize("affine", [True, False], ids=["weights", "no weights"])
def test_without_weights_or_rope(affine, turned, count):
    parts = [part(2, 7, 2, 32, seed=i, affine=affine) for i in range(count)]
    assert_close(parts, rope_of(7 * count, 32) if turned else None, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF], ids=str)
@pytest.mark.parametrize("tokens", [(4096 + 512,), (512, 4096), (77, 1023)], ids=str)
def test_shapes_of_flux(tokens, dtype):
    beside = 12288 if len(tokens) == 1 else 0  # a single block's linear feeds its MLP too
    parts = [part(1, t, 24, 128, seed=t, beside=beside, dtype=dtype) for t in tokens]
    assert_close(parts, rope_of(sum(tokens), 128), 24)


@pytest.mark.gpu
def test_nothing_else_is_allocated():
    parts = [part(1, t, 24, 128, seed=t, dtype=torch.bfloat16) for t in (512, 1024)]
    rope = rope_of(1536, 128)
    launch(parts, rope, heads=24, eps=EPS)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = launch(parts, rope, heads=24, eps=EPS)
    assert torch.cuda.max_memory_allocated() - before == sum(2 * t.numel() for t in out)


def test_weights_in_float32():
    p = part(1, 5, 2, 32, seed=2)
    wide = Part(qkv_BTC=p.qkv_BTC, q_weight=normal(32, seed=8), k_weight=normal(32, seed=9))
    q, k, _ = launch([wide], None, heads=2, eps=EPS)
    want = specification.qk_norm_rope([double(wide)], None, heads=2, eps=EPS)
    for got, true in zip((q, k), want):
        torch.testing.assert_close(got.double(), true, rtol=1e-3, atol=1e-6)


def test_v_of_one_part_is_a_view():
    p = part(2, 5, 2, 32, seed=3, beside=8)
    v = launch([p], None, heads=2, eps=EPS)[2]
    assert v.untyped_storage().data_ptr() == p.qkv_BTC.untyped_storage().data_ptr()


def test_rows_of_nothing_and_of_bad_numbers():
    p = part(1, 6, 1, 32, seed=6)
    p.qkv_BTC[0, 1] = 0
    p.qkv_BTC[0, 2] = 6e-8  # the smallest fp16: eps keeps it small
    p.qkv_BTC[0, 3, 5] = 6e4
    assert_close([p], rope_of(6, 32), 1)
    assert not launch([p], rope_of(6, 32), heads=1, eps=EPS)[0][0, 1].any()
    p.qkv_BTC[0, 4, 3] = torch.nan
    q, k, _ = launch([p], rope_of(6, 32), heads=1, eps=EPS)
    assert q[0, 4].isnan().all()
    assert q[0, [0, 1, 2, 3, 5]].isfinite().all() and k.isfinite().all()


def test_no_tokens():
    p = part(2, 0, 2, 32, seed=0)
    assert all(t.shape == (2, 0, 2, 32) for t in launch([p], None, heads=2, eps=EPS))
    assert_close([p, part(2, 4, 2, 32, seed=0)], rope_of(4, 32), 2)
    assert_close([part(2, 4, 2, 32, seed=0), p], rope_of(4, 32), 2)


def test_eps_counts():
    p = part(1, 4, 2, 32, seed=5)
    assert_close([p], None, 2, eps=0.5)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="3 parts"):
        launch([part(1, 2, 1, 32, seed=0)] * 3, None, heads=1, eps=EPS)


def test_builds_name_every_argument():
    for build in builds():
        assert set(build.signature) | set(build.constants) == set(build.kernel.arg_names)
        assert not set(build.signature) & set(build.constants)
    names = [(build.name, chip) for build in builds() for chip in build.chips]
    assert len(set(names)) == len(names)
