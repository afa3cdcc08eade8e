import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_spec import FP4, tiny_spec

from dirotq.kernels.appended import BIAS_LIMIT, LIMIT, TINY
from dirotq.kernels.formats import quantize_weight as reference
from dirotq.kernels.formats.pack_int4 import pack_int4
from dirotq.kernels.formats.quantize_weight import (
    codes_on_grid,
    dequantize_weight,
    fp4_weight_scales,
    pack_codes,
    scale_floor,
    stored_scales,
    unpack_weight,
    weight_scales,
    weight_steps,
)
from dirotq.kernels.unpack_w4 import unpack_w4

seeds = st.integers(0, 2**32 - 1)


def heavy_tailed(seed: int, rows: int = 6, columns: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(rows, columns, generator=generator)
    return gauss * torch.exp(torch.randn(rows, columns, generator=generator))


ELEMENTS = {"int4": (7, 7), "lm4": (6, 96)}
"""Elements with scales in bf16: what a scale of 1 brings the largest weight to, and its code."""
every_element = pytest.mark.parametrize("element", ELEMENTS)


def weighted_error(w, scale, importance, element="int4"):
    step = weight_steps(scale, None, element)
    error = dequantize_weight(codes_on_grid(w, step, element), step, torch.float64) - w.double()
    return (error.square() * importance.double()).unflatten(-1, (scale.shape[-1], -1)).sum(-1)


@every_element
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("clip", [False, True])
def test_scales_are_positive_bf16_and_codes_in_range(groups, clip, element):
    w = heavy_tailed(0)
    scale = weight_scales(w, groups, clip=clip, element=element)
    assert scale.dtype == torch.bfloat16
    assert scale.shape == (6, groups)
    assert (scale > 0).all()
    codes = codes_on_grid(w, weight_steps(scale, None, element), element)
    assert codes.dtype == torch.int8
    assert codes.abs().max() <= ELEMENTS[element][1]


@every_element
def test_without_clip_the_largest_weight_gets_the_largest_code(element):
    w = heavy_tailed(1)
    scale, (top, code) = weight_scales(w, 4, clip=False, element=element), ELEMENTS[element]
    amax = w.unflatten(-1, (4, -1)).abs().amax(-1)
    torch.testing.assert_close(scale.float(), amax / top, rtol=2**-8, atol=0)
    codes = codes_on_grid(w, weight_steps(scale, None, element), element)
    assert (codes.unflatten(-1, (4, -1)).abs().amax(-1) == code).all()


@given(seeds, st.sampled_from([1, 4]), st.booleans(), st.sampled_from([*ELEMENTS]))
def test_clip_is_never_worse_in_the_weighted_error(seed, groups, weighted, element):
    w = heavy_tailed(seed)
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(64, generator=generator) ** 4 if weighted else torch.ones(64)
    read = importance if weighted else None
    clipped = weight_scales(w, groups, clip=True, importance_K=read, element=element)
    plain = weight_scales(w, groups, clip=False, element=element)
    ours, theirs = (weighted_error(w, s, importance, element) for s in (clipped, plain))
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
@pytest.mark.parametrize("floored", [False, True])
def test_rows_in_parts_give_the_same_scales(clip, floored, monkeypatch):
    w, importance = heavy_tailed(3, rows=7), torch.rand(64)
    more = {"clip": clip, "importance_K": importance}
    if floored:
        more["floor_N1"] = torch.linspace(0, 1, 7)[:, None].bfloat16()
    whole = weight_scales(w, 4, **more)
    sizes, search = [], reference._least_error

    def noted(w, *more):
        sizes.append(len(w))
        return search(w, *more)

    monkeypatch.setattr(reference, "CHUNK", 3 * 64 + 1)
    monkeypatch.setattr(reference, "_least_error", noted)
    assert torch.equal(weight_scales(w, 4, **more), whole)
    assert sizes == [3, 3, 1]


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


def tail_of(seed: int, rows: int = 6, rank: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """wp and bias in bf16, rows of very different size, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(6 * torch.randn(2, rows, 1, generator=generator))
    size *= torch.rand(2, rows, 1, generator=generator) > 0.2
    wp = torch.randn(rows, rank, generator=generator) * size[0]
    bias = torch.randn(rows, generator=generator) * size[1, :, 0]
    return wp.bfloat16(), bias.bfloat16()


@given(seeds)
def test_the_floor_is_the_least_bf16_that_the_tail_needs(seed):
    wp, bias = tail_of(seed)
    need = torch.maximum(wp.double().abs().amax(1) / LIMIT, bias.double().abs() / BIAS_LIMIT)
    floor = scale_floor(wp, bias)
    assert floor.shape == (6, 1)
    assert floor.dtype == torch.bfloat16
    assert (floor[:, 0].double() >= need).all()
    below = torch.nextafter(floor, torch.zeros_like(floor))[:, 0].double()
    assert ((below < need) | (floor[:, 0] <= 1.01 * TINY)).all()


def test_wp_and_bias_each_set_a_floor_and_zeros_none():
    wp = torch.tensor([[512.0, -1024.0], [1.0, 0.0], [0.0, 0.0]]).bfloat16()
    bias = torch.tensor([2048.0, -8192.0, 0.0]).bfloat16()
    assert scale_floor(wp, bias).flatten().tolist() == [2.0, 4.0, 0.0]
    assert scale_floor(wp, None).flatten().tolist() == [2.0, 2**-9, 0.0]
    assert scale_floor(None, bias).flatten().tolist() == [1.0, 4.0, 0.0]
    assert scale_floor(wp[:, :0], None) is None
    assert scale_floor(None, None) is None


def test_the_floor_has_a_reciprocal():
    floor = scale_floor(None, torch.tensor([1e-39, -1e-30, 0.0]).bfloat16())[:, 0]
    assert (floor[:2].double() >= TINY).all()
    assert floor[2] == 0


@given(seeds, st.booleans())
def test_no_scale_is_below_the_floor_and_no_other_moves(seed, clip):
    w, (wp, bias) = heavy_tailed(seed), tail_of(seed)
    floor = scale_floor(wp, bias)
    free = weight_scales(w, 1, clip=clip)
    held = weight_scales(w, 1, clip=clip, floor_N1=floor)
    assert held.dtype == torch.bfloat16
    assert (held >= floor).all()
    largest = weight_scales(w, 1, clip=False)
    assert (held <= torch.maximum(largest, floor)).all()
    untouched = floor <= 0.6 * largest  # below every grid that the clip search tries
    assert torch.equal(held[untouched], free[untouched])


@pytest.mark.parametrize("clip", [False, True])
def test_a_zero_row_with_a_bias_gets_a_scale_and_zero_codes(clip):
    w, bias = torch.zeros(2, 32), torch.tensor([3.0, 0.0]).bfloat16()
    scale = weight_scales(w, 1, clip=clip, floor_N1=scale_floor(None, bias))
    assert scale[0] > 0
    assert scale[1] == 0
    assert not codes_on_grid(w, scale).any()


@given(seeds)
def test_on_the_floor_the_tail_holds_wp_and_bias(seed):
    wp, bias = tail_of(seed)
    floor = scale_floor(wp, bias)
    codes = torch.zeros(6, 64, dtype=torch.int8)
    tail = unpack_w4(pack_int4(codes), torch.float8_e4m3fn, floor, wp, bias)[:, 64:].double()
    high, again, low = (tail[:, 16 * part :][:, :9] for part in range(3))
    assert torch.equal(high, again)
    # Two numbers of four significant bits, the lower one no finer than FP8's least step.
    held = (high + low) * 2 * floor.double()
    want = torch.cat([wp.double(), bias.double()[:, None] / (BIAS_LIMIT / LIMIT)], 1)
    assert ((held - want).abs() <= want.abs() * 2**-8 + floor.double() * 2**-9).all()


every_fp4 = pytest.mark.parametrize("name", FP4)


def fp4_error(w, stored, importance):
    step = weight_steps(*stored)
    error = dequantize_weight(codes_on_grid(w, step, "e2m1"), step, torch.float64) - w.double()
    return (error.square() * importance.double()).unflatten(-1, (step.shape[-1], -1)).sum(-1)


@every_fp4
@pytest.mark.parametrize("clip", [False, True])
def test_fp4_scales_are_bytes_under_one_global_scale(name, clip):
    w = heavy_tailed(0)
    wscale, wglobal = fp4_weight_scales(w, name, clip=clip)
    assert wscale.dtype == torch.uint8
    assert wscale.shape == (6, 64 // FP4[name]["weight_group"])
    if name == "mxfp4":
        assert wglobal is None
        assert (wscale < 255).all()
        return
    assert torch.equal(wglobal, w.abs().amax().reshape(1) / (6 * 448))
    assert (wscale <= 126).all()
    assert (wscale.max() == 126) or clip  # the largest group has E4M3's largest number


@every_fp4
@given(seeds, st.booleans())
def test_an_fp4_search_is_never_worse_in_the_weighted_error(name, seed, weighted):
    w = heavy_tailed(seed)
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(64, generator=generator) ** 4 if weighted else torch.ones(64)
    searched = fp4_weight_scales(w, name, clip=True, importance_K=importance)
    plain = fp4_weight_scales(w, name, clip=False)
    ours, theirs = (fp4_error(w, stored, importance) for stored in (searched, plain))
    assert (ours <= theirs * (1 + 1e-5) + 1e-12).all()


def test_an_fp4_search_finds_what_saturates_and_what_falls_between():
    w = torch.zeros(1, 64)
    w[0, 0] = 7.75  # of MXFP4's rule 6, of the next power of two 8
    plain, searched = (fp4_weight_scales(w, "mxfp4", clip=clip)[0] for clip in (False, True))
    assert (plain[0, 0], searched[0, 0]) == (127, 128)
    w[0, :4] = 5.0  # of a group with 6: halfway between 4 and 6
    w[0, 4], w[0, 16] = 6.0, 42.0  # the global scale is 2^-6
    plain, searched = (fp4_weight_scales(w, "nvfp4", clip=clip) for clip in (False, True))
    lost = [fp4_error(w, stored, torch.ones(64))[0, 0] for stored in (plain, searched)]
    assert lost[1] < lost[0] / 4  # four over six: 5 / 1.5 = 3.33, 6 / 1.5 = 4


@every_fp4
@given(seeds)
def test_what_is_stored_is_on_its_own_grid(name, seed):
    """Packed, unpacked and quantized again: the same nibbles under the same bytes."""
    w = heavy_tailed(seed)
    stored = fp4_weight_scales(w, name, clip=False)
    packed = pack_codes(codes_on_grid(w, weight_steps(*stored), "e2m1"), "e2m1")
    codes, step = unpack_weight(packed, *stored)
    again = dequantize_weight(codes, step)
    assert torch.equal(pack_codes(codes_on_grid(again, step, "e2m1"), "e2m1"), packed)
    if name == "mxfp4":  # its rule finds the same powers of two; E4M3's subnormals need not
        kept = codes.unflatten(-1, (step.shape[-1], -1)).any(-1)
        assert torch.equal(fp4_weight_scales(again, name, clip=False)[0][kept], stored[0][kept])


@every_fp4
def test_fp4_rows_in_parts_give_the_same_scales(name, monkeypatch):
    w, importance = heavy_tailed(3, rows=7), torch.rand(64)
    whole = fp4_weight_scales(w, name, clip=True, importance_K=importance)
    monkeypatch.setattr(reference, "CHUNK", 3 * 64 + 1)
    parts = fp4_weight_scales(w, name, clip=True, importance_K=importance)
    assert torch.equal(parts[0], whole[0])
    assert parts[1] is whole[1] is None or torch.equal(parts[1], whole[1])


@every_fp4
def test_zero_fp4_weights_are_zero(name):
    w = torch.zeros(3, 64)
    w[0, :32] = torch.randn(32)
    for weight in (w, torch.zeros(2, 64)):
        stored = fp4_weight_scales(weight, name, clip=True)
        codes = codes_on_grid(weight, weight_steps(*stored), "e2m1")
        assert not codes[weight == 0].any()
        assert weight_steps(*stored).isfinite().all()


def test_the_spec_says_what_is_stored():
    w = heavy_tailed(4)
    floor = torch.full((6, 1), 8.0, dtype=torch.bfloat16)
    scale, nothing = stored_scales(w, tiny_spec(), clip=False, floor_N1=floor)
    assert nothing is None
    assert torch.equal(scale, weight_scales(w, 1, clip=False, floor_N1=floor))
    scale, nothing = stored_scales(w, tiny_spec(weight_scale="lm4_group"), clip=True)
    assert nothing is None
    assert torch.equal(scale, weight_scales(w, 4, clip=True, element="lm4"))
    for name, fields in FP4.items():
        stored = stored_scales(w, tiny_spec(**fields), clip=True)
        want = fp4_weight_scales(w, name, clip=True)
        assert torch.equal(stored[0], want[0])
        assert (stored[1] is None) == (name == "mxfp4")
