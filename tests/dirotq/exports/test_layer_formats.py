"""What a format can hold, one fact at a time: each that it can't is refused by itself."""

import pytest
import torch
from exportable import shortest
from tiny_packed import packed
from tiny_spec import FP4, tiny_spec

from dirotq.errors import UnsupportedError
from dirotq.exports.formats import FORMATS, refuse_misfits
from dirotq.models.family import Site

NVFP4 = {**FP4["nvfp4"], "dim": 64}
GROUPS = {"weight_scale": "group", "act_scale": "group", "weight_group": 64, "act_group": 64}
REGULAR = {"transform": "regular", "block": 16}
SIXTEEN = {"act_bits": 16, "weight_scale": "group", "weight_group": 64}
BESIDE = {"rank": 16, "branch": "beside"}
HOLDS = {
    "convrot_w4a4": REGULAR, "svdquant_w4a4": GROUPS | BESIDE, "nvfp4": NVFP4,
    "comfy_nvfp4": NVFP4,
}  # fmt: skip
"""A linear that the format can say all of."""
KNOWN = {known.name: known for known in FORMATS}

ROTATED, BRANCH = {"block": 16}, {"rank": 16}
LACKS = [
    ("convrot_w4a4", {"transform": "hadamard"}, "Sylvester"),
    ("convrot_w4a4", {"transform": "regular", "block": 1}, "no rotation"),
    ("convrot_w4a4", BRANCH, "low-rank branch of rank 16"),
    ("convrot_w4a4", {"weight_scale": "group"}, "per group of 16"),
    ("convrot_w4a4", {"weight_scale": "lm4_channel"}, "lm4 weights with one scale per output (it"),
    ("convrot_w4a4", {"act_scale": "pow2"}, "`pow2` scales"),
    ("convrot_w4a4", {"dim": 48}, "48 channels"),
    ("svdquant_w4a4", ROTATED, "Hadamard blocks of 16"),
    ("svdquant_w4a4", {"branch": "project"}, "taken out of the input"),
    ("svdquant_w4a4", {"weight_group": 32}, "weights with one scale per group of 32"),
    ("svdquant_w4a4", {"weight_scale": "lm4_group"}, "lm4 weights with one scale per group of 64"),
    ("svdquant_w4a4", {"act_group": 32}, "`group` scales"),
    *((name, *more) for name in ("nvfp4", "comfy_nvfp4") for more in (
        (ROTATED, "Hadamard blocks of 16"),
        (BRANCH, "low-rank branch of rank 16"),
    )),
    ("comfy_nvfp4", {"rows": (40,)}, "[40] outputs"),
]  # fmt: skip


@pytest.mark.parametrize("name", HOLDS)
def test_it_holds_what_it_is_for(name):
    assert KNOWN[name].fits(tiny_spec(**HOLDS[name]))


@pytest.mark.parametrize(("name", "change", "said"), LACKS)
def test_each_fact_that_it_lacks_is_refused_by_itself(name, change, said):
    spec = tiny_spec(**HOLDS[name] | change)
    (problem,) = KNOWN[name].of(spec).misfits(spec)
    assert said in problem
    assert not KNOWN[name].fits(spec)


@pytest.mark.parametrize("name", ["nvfp4", "comfy_nvfp4"])
def test_the_other_fp4_is_refused_on_both_sides(name):
    """One FP4 format is on both sides of every spec."""
    problems = list(KNOWN[name].misfits(tiny_spec(**FP4["mxfp4"])))
    assert [word in p for word, p in zip(("mxfp4 weights", "`mxfp4`"), problems, strict=True)] == [
        True, True,
    ]  # fmt: skip


def test_modulators_of_levels_are_refused_but_as_bfloat16():
    spec = tiny_spec(**SIXTEEN | {"weight_scale": "lm4_group"})
    linear = packed(spec)
    weight = KNOWN["nvfp4"].of(spec).tensors(linear.packed(), spec)["weight"]
    assert torch.equal(weight, linear.weight.bfloat16())
    (problem,) = KNOWN["svdquant_w4a4"].of(spec).misfits(spec)
    assert problem == (
        "lm4 weights with one scale per group of 64 (it has int4 with one scale per group)"
    )


@pytest.mark.parametrize("name", HOLDS)
@pytest.mark.parametrize(("change", "said"), [(ROTATED, "Hadamard"), (BRANCH, "low-rank branch")])
def test_modulators_are_held_without_rotation_and_branch(name, change, said):
    plain, spec = tiny_spec(**SIXTEEN), tiny_spec(**SIXTEEN | change)
    assert KNOWN[name].fits(plain)
    (problem,) = KNOWN[name].of(spec).misfits(spec)
    assert said in problem


def _site(width: int) -> Site:
    return Site("blocks.0.qkv", ("q", "k"), width, (256, 256), kind="block", bias=True)


@pytest.mark.parametrize("name", HOLDS)
def test_what_a_format_is_packed_by_is_the_shortest_of_all_settings(name):
    listed = list(KNOWN[name].packed_by)
    assert listed == shortest(KNOWN[name], [_site(256), _site(1024)])[: len(listed)]


@pytest.mark.parametrize(("width", "says"), [(256, "pack it again with"), (240, "No plan of this")])
def test_only_plans_that_fit_the_widths_are_advised(width, says):
    """240 channels have no groups of 64, which is all that svdquant_w4a4 knows."""
    with pytest.raises(UnsupportedError, match=says):
        refuse_misfits(KNOWN["svdquant_w4a4"], [(_site(width), tiny_spec(**NVFP4))])
