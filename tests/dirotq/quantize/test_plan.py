import dataclasses
import json

import pytest
from tiny_line import METHODS, method

from dirotq.errors import ConfigError
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.models.family import Site
from dirotq.quantize.plan import Method, SitePlan, fitting_group, read_plan, write_plan

BLOCK = Site("a.qkv", ("a.q", "a.k", "a.v"), 96, (8, 8, 16), "block", True)
MODULATOR = Site("a.norm.linear", ("a.norm.linear",), 64, (384,), "modulator", True)


@pytest.mark.parametrize("name", METHODS)
def test_plan_round_trip(name, tmp_path):
    used = method(name)
    plan = [
        SitePlan(site, used.spec(site, 16), used.rounding, used.weight_clip, "because")
        for site in (BLOCK, MODULATOR)
    ]
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())[0]["site"]["name"] == "a.qkv"


def test_a_block_takes_the_method_and_the_largest_hadamard_block_that_fits():
    spec = method("dirotq", "act_format.group=32").spec(BLOCK, 16)
    assert (spec.in_features, spec.out_features, spec.rank, spec.transform.block) == (
        96,
        (8, 8, 16),
        16,
        32,
    )
    assert (spec.transform.kind, spec.activations.element) == ("hadamard", "int4")
    assert (spec.activations.statistic, spec.activations.shifted) == ("rms", True)


@pytest.mark.parametrize("name", METHODS)
def test_a_modulator_is_w4a16_in_groups_and_never_rotated(name):
    spec = method(name).spec(MODULATOR, 16)
    assert (spec.rank, spec.transform.kind, spec.transform.block) == (0, "hadamard", 1)
    weights = "lm4_group" if method(name).weights.element == "lm4" else "group"
    assert (spec.activations.bits, spec.weights.name, spec.weights.group) == (16, weights, 64)


def test_modulators_may_stay_in_sixteen_bits():
    assert method("dirotq", modulator_group=None).spec(MODULATOR, 0) is None
    assert method("dirotq", "act_format.group=32", modulator_group=None).spec(BLOCK, 0) is not None


def test_keys_and_values_of_a_text_have_a_group_of_their_own():
    text = dataclasses.replace(MODULATOR, text=True)
    packed, kept = method("dirotq", text_group=32), method("dirotq", text_group=None)
    assert packed.spec(text, 0).weights.group == 32
    assert packed.spec(MODULATOR, 0).weights.group == 64
    assert kept.spec(text, 0) is None
    assert kept.spec(MODULATOR, 0) is not None
    assert "text_group" not in kept.identity()  # as recipes of before
    assert packed.identity()["text_group"] == 32


@pytest.mark.parametrize(
    ("group", "channels", "fitting"),
    [
        (64, 3072, 64),
        (64, 96, 32),
        (64, 5600, 32),  # SANA's inner channels
        (64, 80, 16),
        (48, 72, 24),
        (64, 72, 64),  # 8 would fit, but no kernel has groups that small
        (40, 96, 40),
        (7, 96, 7),
        (0, 96, 0),
        (-16, 96, -16),
    ],
)
def test_a_group_that_does_not_fit_is_halved(group, channels, fitting):
    assert fitting_group(group, channels) == fitting


def test_the_spec_tells_which_group_a_site_took():
    spec = method("groups").spec(BLOCK, 16)
    assert (spec.activations.group, spec.weights.group) == (32, 32)
    narrow = dataclasses.replace(MODULATOR, in_features=96)
    assert method("dirotq").spec(narrow, 0).weights.group == 32


def test_fp4_groups_are_the_formats_own():
    for name, group in (("nvfp4", 16), ("mxfp4", 32)):
        spec = method(f"dirotq_{name}").spec(BLOCK, 16)
        assert (spec.weights.name, spec.activations.name) == (name, name)
        assert (spec.weights.group, spec.activations.group) == (group, group)
        assert spec.transform.block == (1 if name == "nvfp4" else 32)
        modulator = method(f"dirotq_{name}").spec(MODULATOR, 0)
        assert (modulator.weights.name, modulator.activations.bits) == ("group", 16)


def test_quartz_cuts_activations_and_is_like_its_rivals_else():
    block, modulator = (method("quartz").spec(site, 16) for site in (BLOCK, MODULATOR))
    assert (block.activations.name, block.activations.group_size) == ("lzs", 16)
    assert (block.transform.block, block.rank, block.weights.name) == (1, 0, "group")
    assert modulator.weights == method("quarot").spec(MODULATOR, 16).weights
    assert QuantSpec.from_dict(block.to_dict()) == block
    finer = method("quartz", "method.overrides=[{sites: '*', act_bits: 8}]").spec(BLOCK, 16)
    assert (finer.activations.element, finer.activations.name) == ("int8", "token")


@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_levels_are_for_blocks_and_modulators(granularity):
    chosen = method("dirotq", f"weight_format=lm4_{granularity}")
    block, modulator = chosen.spec(BLOCK, 16), chosen.spec(MODULATOR, 0)
    assert block.weights.name == f"lm4_{granularity}"
    assert block.weights.group == 32  # half of 64 divides the site's 96 channels
    assert block.format == "W4A4 LM4"
    assert block.can_append == (granularity == "channel")
    assert (modulator.weights.name, modulator.weights.group) == ("lm4_group", 64)
    assert (modulator.activations.bits, modulator.format) == (16, "W4A16 LM4")
    assert block.since == modulator.since == 3
    assert QuantSpec.from_dict(block.to_dict()) == block


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("weight_format=lm4", r"lm4_channel"),
        ("weight_format.element=lm5", "'lm5' does not fit.*'int4' or 'lm4' or 'e2m1'"),
        ("weight_format.scale=e4m3", "no format of lm4 weights has scales in e4m3"),
        ("+weight_format.levels=[1,2]", "levels"),
    ],
)
def test_weight_formats_that_there_are_not(change, message):
    with pytest.raises(ConfigError, match=message):
        method("dirotq", change)


def test_fp4_groups_that_do_not_divide_a_site_are_refused():
    narrow = dataclasses.replace(BLOCK, in_features=80)
    assert method("dirotq_nvfp4").spec(narrow, 0).weights.group == 16
    with pytest.raises(ConfigError, match=r"site a\.qkv.*weight group 32 does not divide the 80"):
        method("dirotq_mxfp4").spec(narrow, 0)
    with pytest.raises(ConfigError, match=r"weight_format: nvfp4 has groups of 16, not 64"):
        method("dirotq_nvfp4", "weight_format.group=64")
    with pytest.raises(ConfigError, match=r"act_format: mxfp4 has groups of 32, not 16"):
        method("dirotq_mxfp4", "act_format.group=16")


def test_a_group_of_128():
    wide = dataclasses.replace(BLOCK, in_features=3072)
    spec = method("groups", "weight_format.group=128", "act_format.group=128").spec(wide, 64)
    assert (spec.weight_group_size, spec.act_group_size) == (128, 128)
    assert (
        method("groups", "weight_format.group=128", "act_format.group=128")
        .spec(BLOCK, 0)
        .activations.group
        == 32
    )


def test_a_dense_rotation_takes_any_group():
    dense = method("dirotq_dense", "weight_format=int4_group", "act_format.group=64").spec(
        BLOCK, 16
    )
    assert (dense.activations.group, dense.weights.group, dense.width) == (64, 64, 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["act_format.group=40"],
            r"site a\.qkv, method dirotq: activation group 40 does not divide the 96",
        ),
        (["weight_format=int4_group", "weight_format.group=40"], r"site a\.qkv.*weight group 40"),
    ],
)
def test_formats_that_do_not_fit_name_the_site(changes, message):
    with pytest.raises(ConfigError, match=message):
        method("dirotq", *changes).spec(BLOCK, 16)


def test_a_rank_above_the_channels_names_the_site():
    with pytest.raises(ConfigError, match=r"site a\.qkv.*rank 104 is not in 0 \.\.\. 96"):
        method("dirotq").spec(BLOCK, 104)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["method.rounding=up"], r"method\.rounding='up' does not fit"),
        (["transform.block=0"], r"transform: Hadamard block 0 is not a power of two"),
        (["transform.block=96"], r"transform: Hadamard block 96 is not a power of two"),
        (["act_format=int4_pow2", "act_format.element=int8"], "act_format: 8-bit.*leave INT8"),
        (["act_format.element=lzs"], "no format of lzs activations has rms scales"),
        (["transform=dense"], "transform=dense rotates all.*set method.leading=null"),
    ],
)
def test_methods_are_checked_when_built(changes, message):
    with pytest.raises(ConfigError, match=message):
        method("dirotq", *changes)


def test_methods_of_the_config_tree_differ_in_what_they_say():
    built: dict[str, Method] = {name: method(name) for name in METHODS}
    assert built["dirotq_dense"].transform.kind == "dense"
    assert built["rtn"].branch is None
    assert built["rtn"].rounding == "nearest"
    assert built["dirotq_w4a8"].activations.element == "e4m3"
