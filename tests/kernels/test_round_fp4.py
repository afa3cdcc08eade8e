"""Rounding to FP4 by its kernel against the specification, in the interpreter without a GPU.

Without a transform z is x, so that bytes must be equal.
"""

import pytest
import torch
from formats import DEVICE, inputs, random_linear
from tiny_spec import FP4, tiny_spec
from torch import Tensor

pytest.importorskip("triton")

from dirotq.kernels.buffers import Fp4Codes
from dirotq.kernels.formats.fp4 import CODES, nearest_e2m1, pack_e2m1, steps, unpack_e2m1
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.prologue import gelu, plain
from dirotq.kernels.transform_quantize import quantize_rows, transform
from dirotq.kernels.transform_quantize.fp4 import launch

HALF = torch.float16
every_format = pytest.mark.parametrize("name", FP4)


def rounded(x: Tensor, spec: QuantSpec, basis: Tensor | None = None) -> Fp4Codes:
    return launch(plain(x[None]), basis, None, spec)


def steps_of(codes: Fp4Codes) -> Tensor:
    return steps(codes.scale, None if codes.row is None else codes.row[:, None])


@every_format
@pytest.mark.parametrize("width", [64, 96, 160, 1088])
@pytest.mark.parametrize("rows", [1, 7])
def test_rows_as_they_are(name, width, rows, empty_is):
    spec = tiny_spec(dim=width, **FP4[name])
    x = inputs(rows, width, HALF)
    with empty_is(255):
        got = rounded(x, spec)
    want, step = quantize_rows(x, spec)
    assert torch.equal(steps_of(got), step)
    assert torch.equal(unpack_e2m1(got.codes), want)
    assert got.codes.shape == (rows, width // 2)
    assert (got.c, got.row is None) == (None, name == "mxfp4")


def ties(name: str) -> Tensor:
    """Two rows: every quarter of a code from -13 to 13, with a step that is a power of two."""
    quarters = torch.arange(-52, 53) / 4
    rest = torch.zeros(-len(quarters) % 32)
    if name == "mxfp4":  # 6 to the end of a group: a step of 1/2
        groups = torch.cat([quarters, rest]).view(-1, 16)
        row = torch.cat([torch.full((len(groups), 16), 12.0), groups], 1).flatten() / 2
    else:  # 21 makes the row's scale 2^-7; groups that end at 3/4 have a step of 2^-4
        groups = torch.cat([quarters.clamp(-12, 12), rest])
        groups = torch.stack([groups, torch.full_like(groups, 12)], 1).view(-1, 16)
        row = torch.cat([torch.full((16,), 21 * 16.0), groups.flatten(), torch.zeros(16)]) / 16
    return torch.stack([row, -row]).to(HALF).to(DEVICE)


@every_format
def test_ties_go_to_the_even_mantissa(name):
    x = ties(name)
    spec = tiny_spec(dim=x.shape[1], **FP4[name])
    got = rounded(x, spec)
    want, step = quantize_rows(x, spec)
    assert {0.5, 2.0**-4} & set(step.flatten().tolist())
    halves = (x.float().unflatten(1, (*step.shape[1:], -1)) / step[..., None]).abs()
    assert {0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0} <= set(halves.flatten().tolist())
    assert torch.equal(unpack_e2m1(got.codes), want)
    assert set(want.flatten().tolist()) == {s * c for s in (1, -1) for c in CODES}


@every_format
def test_packing_is_that_of_layout_l2(name):
    spec = tiny_spec(dim=64, **FP4[name])
    x = inputs(3, 64, HALF)
    codes, _ = quantize_rows(x, spec)
    codes[codes == 0] = 1  # zeros may keep a sign
    got = rounded(x, spec).codes
    zero = (unpack_e2m1(got) == 0).view(3, 32, 2)
    want = pack_e2m1(codes)
    mask = torch.where(zero[..., 0], 0, 15) | torch.where(zero[..., 1], 0, 240)
    assert torch.equal(got & mask, want & mask)


@every_format
@pytest.mark.parametrize("block", [1, 32, 256])
def test_after_a_projection_and_a_rotation(name, block):
    """z differs from the specification's by its rounding: codes are the nearest of either."""
    spec = tiny_spec(dim=256, rank=24, block=block, **FP4[name])
    basis, x = random_linear(spec).basis, inputs(16, 256, HALF)
    got = rounded(x, spec, basis)
    z, c = transform(x, basis, None, spec)
    torch.testing.assert_close(got.c, c, rtol=2e-3, atol=2e-3)
    want, step = quantize_rows(z, spec)
    assert ((steps_of(got) - step).abs() <= 0.13 * step).float().mean() > 0.99
    same = unpack_e2m1(got.codes) == want
    assert same.float().mean() > 0.99


@every_format
def test_a_prologue_is_computed_on_the_way(name):
    spec = tiny_spec(dim=192, rank=8, block=64, **FP4[name])
    basis, x = random_linear(spec).basis, inputs(16, 192, HALF)
    got = launch(gelu(x[None]), basis, None, spec)
    want = rounded(gelu(x[None]).value()[0], spec, basis)
    same = unpack_e2m1(got.codes) == unpack_e2m1(want.codes)
    assert same.float().mean() > 0.98


@every_format
def test_zeros_and_numbers_that_are_none(name):
    spec = tiny_spec(dim=96, **FP4[name])
    x = inputs(6, 96, HALF)
    before = rounded(x, spec)
    x[1], x[2, 40], x[4, 90] = 0, torch.nan, torch.inf
    got = rounded(x, spec)
    assert not unpack_e2m1(got.codes)[1].any()
    values = unpack_e2m1(got.codes).float().unflatten(1, (*got.scale.shape[1:], -1))
    values = values * steps_of(got)[..., None]
    assert not values[1].any()
    assert all(values[row].isfinite().logical_not().any() for row in (2, 4))
    kept = [0, 3, 5]
    assert torch.equal(got.codes[kept], before.codes[kept])
    assert torch.equal(got.scale[kept], before.scale[kept])


def test_the_nearest_code_is_the_specifications():
    """What the tests above compare with rounds as docs/method.md says."""
    halves = torch.tensor([0.5, 1.5, 5.0, 7.0, 10.0, 99.0])
    assert nearest_e2m1(halves, torch.ones(1)).tolist() == [0, 2, 4, 8, 8, 12]
