import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dirotq.kernels.quantize_weight import codes_on_grid, dequantize_weight, weight_scales

seeds = st.integers(0, 2**32 - 1)


def heavy_tailed(seed: int, rows: int = 6, columns: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(rows, columns, generator=generator)
    return gauss * torch.exp(torch.randn(rows, columns, generator=generator))


def weighted_error(w, scale, importance):
    error = dequantize_weight(codes_on_grid(w, scale), scale, torch.float64) - w.double()
    return (error.square() * importance.double()).unflatten(-1, (scale.shape[-1], -1)).sum(-1)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("clip", [False, True])
def test_scales_are_positive_bf16_and_codes_in_range(groups, clip):
    w = heavy_tailed(0)
    scale = weight_scales(w, groups, clip=clip)
    assert scale.dtype == torch.bfloat16
    assert scale.shape == (6, groups)
    assert (scale > 0).all()
    codes = codes_on_grid(w, scale)
    assert codes.dtype == torch.int8
    assert codes.abs().max() <= 7


def test_without_clip_the_largest_weight_gets_the_largest_code():
    w = heavy_tailed(1)
    scale = weight_scales(w, 4, clip=False)
    amax = w.unflatten(-1, (4, -1)).abs().amax(-1)
    torch.testing.assert_close(scale.float(), amax / 7, rtol=2**-8, atol=0)
    assert (codes_on_grid(w, scale).unflatten(-1, (4, -1)).abs().amax(-1) == 7).all()


@given(seeds, st.sampled_from([1, 4]), st.booleans())
def test_clip_is_never_worse_in_the_weighted_error(seed, groups, weighted):
    w = heavy_tailed(seed)
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(64, generator=generator) ** 4 if weighted else torch.ones(64)
    clipped = weight_scales(w, groups, clip=True, importance_K=importance if weighted else None)
    plain = weight_scales(w, groups, clip=False)
    ours, theirs = (weighted_error(w, s, importance) for s in (clipped, plain))
    assert (ours <= theirs * (1 + 1e-5) + 1e-12).all()


def test_clip_gives_up_an_outlier_that_no_activation_reads():
    w = torch.randn(4, 64)
    w[:, 9] = 12.0
    read = torch.ones(64)
    read[9] = 0.0
    tolerant = weight_scales(w, 1, clip=True, importance_K=read)
    assert torch.equal(tolerant, (w[:, 9:10] * (0.6 / 7)).to(torch.bfloat16))
    assert (weight_scales(w, 1, clip=True, importance_K=torch.ones(64)) > tolerant).all()


def test_codes_are_the_nearest_of_all_fifteen():
    w, scale = torch.randn(5, 16), torch.full((5, 2), 0.25, dtype=torch.bfloat16)
    scale[2] = 0.01  # most of this row lies outside of the grid
    choices = torch.arange(-7, 8)[:, None, None] * scale.float().repeat_interleave(8, 1)
    best = (choices - w).abs().amin(0)
    got = (dequantize_weight(codes_on_grid(w, scale), scale) - w).abs()
    torch.testing.assert_close(got, best)


@pytest.mark.parametrize("clip", [False, True])
def test_zero_rows_and_rows_below_bf16_are_zero(clip):
    w = torch.randn(3, 32)
    w[1] = 0.0
    w[2] = 1e-44
    scale = weight_scales(w, 2, clip=clip)
    codes = codes_on_grid(w, scale)
    assert not scale[1:].any()
    assert not codes[1:].any()
    assert codes[0].any()
    assert not dequantize_weight(codes, scale)[1:].any()


@pytest.mark.parametrize("clip", [False, True])
def test_groups_do_not_see_each_other(clip):
    w = heavy_tailed(2)
    before = weight_scales(w, 4, clip=clip)
    w[:, 16:32] *= 100
    after = weight_scales(w, 4, clip=clip)
    assert torch.equal(before[:, [0, 2, 3]], after[:, [0, 2, 3]])
    assert not torch.equal(before[:, 1], after[:, 1])


def test_dequantize_multiplies_each_group_by_its_scale():
    codes = torch.tensor([[1, -2, 3, 4]], dtype=torch.int8)
    scale = torch.tensor([[0.5, 2.0]], dtype=torch.bfloat16)
    assert dequantize_weight(codes, scale).tolist() == [[0.5, -1.0, 6.0, 8.0]]
