"""Linears of every format with numbers that make sense, and whether a wrong result is noticed."""

import math

import pytest
import torch
from tiny_spec import FP4, tiny_spec

from dirotq.kernels.plan import kind_of
from dirotq.quantizer import check_numbers
from dirotq.tuning.random_linear import FORMATS, Checker, random_linear, random_rows, spec_for

SPECS = {kind: spec_for(kind, 256, 64, rank=16) for kind in FORMATS} | {
    "dense": tiny_spec(dim=256, rank=16, transform="dense"),
    "smooth": tiny_spec(dim=256, smooth=True, transform="hadamard"),
    "protected in 8 bits": tiny_spec(dim=256, rank=16, protected_bits=8),
    "levels": tiny_spec(dim=256, weight_scale="lm4_channel"),
    "nvfp4": tiny_spec(dim=256, **FP4["nvfp4"]),
    "mxfp4": tiny_spec(dim=256, **FP4["mxfp4"]),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_named_as_the_table_of_plans_names_them(kind):
    assert kind_of(spec_for(kind, 256, 64)) == kind


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("byte", [0, 255])
def test_every_tensor_of_every_format_is_drawn(name, byte, empty_is):
    """What nobody drew is NaN, or the same in both: the loader would refuse it."""
    torch.manual_seed(0)
    with empty_is(byte):
        linear = random_linear(SPECS[name], device="cpu")
    check_numbers(name, linear)
    for tensor in linear.parameters():
        assert tensor.count_nonzero() > 0.5 * tensor.numel()
        assert tensor.float().abs().max() < 300
    y = linear(random_rows(3, 256, device="cpu"))
    assert y.isfinite().all() and y.std() > 0.1


def test_a_wrong_result_is_noticed():
    linear, x = (
        random_linear(spec_for("w4a4", 128, 48), device="cpu"),
        random_rows(70, 128, device="cpu"),
    )
    checker = Checker(linear, x)
    y = linear(x)
    assert len(checker.rows) == 64
    assert checker.problem(y) is None
    y[69] *= 2
    assert "wrong result" in checker.problem(y)
    assert "wrong result" in checker.problem(y * math.nan)
