import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_spec import tiny_spec

from dirotq.kernels.formats.spec import QuantSpec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": -1}, r"rank -1 is not in 0 \.\.\. 64"),
        ({"rank": 65}, r"rank 65 is not in 0 \.\.\. 64 \(the site's channels\)"),
        ({"transform": "fourier"}, "'fourier' is not 'hadamard', 'regular' or 'dense'"),
        ({"block": 48}, "block 48 is not a power of two"),
        ({"block": 128}, "block 128 is not a power of two dividing 64"),
        ({"transform": "regular", "block": 32}, "block 32 is not a power of four dividing 64"),
        ({"branch": "around"}, "branch 'around' is neither 'project' nor 'beside'"),
        ({"transform": "dense", "branch": "beside"}, "takes its directions out of the input"),
        ({"smooth": True, "rank": 8}, "smoothing goes with.*only in branch 'beside'"),
        ({"smooth": True, "transform": "dense"}, "smoothing goes with Hadamard transforms"),
        ({"protected_bits": 4}, "take 8 or 16 bits, not 4"),
        ({"weight_bits": 8}, "W8A4 is not supported; weights take 4 bits"),
        ({"act_bits": 5}, "W4A5 is not supported.*4, 8 or 16"),
        (
            {"weight_scale": "token"},
            "weight scale 'token' is not 'channel', 'group', 'lm4_channel', .* or 'mxfp4'",
        ),
        (
            {"act_scale": "channel"},
            "activation scale 'channel' is not 'token', 'pow2', 'rms', 'gr",
        ),
        (
            {"act_bits": 8, "act_scale": "pow2"},
            "leave INT8: use scale 'token' or 'group', or 'rms'",
        ),
        ({"act_bits": 8, "act_scale": "lzs"}, "leave INT8: use scale 'token'"),
        ({"act_scale": "lzs", "act_group": 60}, "activation group 60 does not divide"),
        ({"dim": 63}, "63 codes wide; two codes share a byte"),
        ({"weight_scale": "nvfp4"}, "'nvfp4' and activations in 'token' share no matrix unit: use"),
        (
            {"weight_scale": "nvfp4", "act_scale": "mxfp4", "act_group": 32},
            "'nvfp4' and activations in 'mxfp4' share no matrix unit",
        ),
        (
            {"weight_scale": "nvfp4", "act_scale": "nvfp4", "act_bits": 8},
            "nvfp4 activations have 4 bits, not 8",
        ),
        (
            {"weight_scale": "nvfp4", "act_scale": "nvfp4", "weight_group": 64},
            "nvfp4 has groups of 16, not 64: set the weights' group to 16",
        ),
        (
            {"weight_scale": "mxfp4", "act_scale": "mxfp4", "weight_group": 32},
            "mxfp4 has groups of 32, not 16: set the activations' group to 32",
        ),
        (
            {"weight_scale": "nvfp4", "act_scale": "nvfp4", "dim": 72},
            r"weight group 16 does not divide the 72 channels",
        ),
        (
            {"weight_scale": "group", "weight_group": 48},
            r"weight group 48 does not divide the 64 channels.*use one of \[16, 32, 64\]",
        ),
        (
            {"act_scale": "pow2", "act_group": 60},
            r"activation group 60 does not divide the 64 channels.*use one of \[16, 32, 64\]",
        ),
        ({"act_scale": "group", "act_group": -16}, "activation group -16 does not divide"),
        ({"weight_scale": "group", "weight_group": 0}, "weight group 0 does not divide"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_refused_with_a_way_out(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_spec(**changes)


def test_hadamard_keeps_every_channel():
    spec = tiny_spec(rank=16, block=64, rows=(8, 24, 16))
    assert spec.width == 64
    assert spec.outputs == 48


@pytest.mark.parametrize(
    ("rank", "weight_scale", "act_scale", "width"),
    [
        (0, "channel", "token", 64),
        (16, "channel", "token", 48),
        (15, "channel", "token", 50),  # 49 channels and one of zeros: two codes share a byte
        (8, "group", "token", 64),  # 56 channels fill up to four groups of 16
        (8, "channel", "group", 64),
        (16, "group", "group", 48),
    ],
)
def test_dense_keeps_the_rest_filled_up_to_whole_groups(rank, weight_scale, act_scale, width):
    spec = tiny_spec(rank=rank, transform="dense", weight_scale=weight_scale, act_scale=act_scale)
    assert spec.width == width


def test_dense_fills_groups_of_both_sides():
    spec = tiny_spec(transform="dense", weight_scale="group", act_scale="group", act_group=24)
    assert spec.width == 96  # a multiple of 16 and of 24


def test_dense_needs_something_to_rotate():
    with pytest.raises(ValueError, match="rank 64 leaves no channel"):
        tiny_spec(transform="dense", rank=64)


def test_group_sizes():
    whole = tiny_spec()
    assert (whole.weight_group_size, whole.act_group_size) == (64, 64)
    grouped = tiny_spec(weight_scale="group", act_scale="pow2", act_group=32)
    assert (grouped.weight_group_size, grouped.act_group_size) == (16, 32)


@pytest.mark.parametrize(("name", "group"), [("nvfp4", 16), ("mxfp4", 32)])
def test_fp4_formats(name, group):
    both = {"weight_scale": name, "act_scale": name, "weight_group": group, "act_group": group}
    spec = tiny_spec(**both)
    assert (spec.weight_group_size, spec.act_group_size) == (group, group)
    assert (spec.weights.element, spec.format) == ("e2m1", f"W4A4 {name.upper()}")
    assert (tiny_spec().weights.element, tiny_spec().format) == ("int4", "W4A4")
    assert tiny_spec(**both, rank=8, transform="dense").width == 64  # filled up to whole groups
    sixteen = tiny_spec(weight_scale=name, weight_group=group, act_bits=16)
    assert sixteen.weights.element == "e2m1"
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_sixteen_bit_activations_have_no_groups_to_check():
    assert tiny_spec(act_bits=16, act_scale="group", act_group=60).act_group_size == 64


@given(
    rank=st.sampled_from([0, 8, 16, 64]),
    block=st.sampled_from([1, 16, 64]),
    act=st.sampled_from(
        [(4, "token"), (4, "pow2"), (4, "group"), (4, "lzs"), (8, "group"), (16, "token")]
    ),
    rows=st.lists(st.integers(1, 100), min_size=1, max_size=4),
)
def test_round_trip_through_json(rank, block, act, rows):
    spec = tiny_spec(rank=rank, block=block, act_bits=act[0], act_scale=act[1], rows=rows)
    assert isinstance(spec.out_features, tuple)
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert hash(spec) == hash(QuantSpec.from_dict(spec.to_dict()))


def test_an_unknown_field_is_not_swallowed():
    with pytest.raises(TypeError, match="colour"):
        QuantSpec.from_dict(tiny_spec().to_dict() | {"colour": "red"})


def test_a_folder_packed_before_a_field_existed_still_loads():
    spec = tiny_spec(rank=8)
    assert spec.since == 1
    assert tiny_spec(rank=8, branch="beside").since == 2
    assert tiny_spec(transform="regular", block=16).since == 2
    assert tiny_spec(act_scale="lzs").since == 3
    older = {
        k: v for k, v in spec.to_dict().items() if k not in ("branch", "smooth", "protected_bits")
    }
    assert QuantSpec.from_dict(older) == spec


def test_only_what_the_runtime_can_put_into_a_tail_has_one():
    assert tiny_spec(rank=8).can_append
    assert tiny_spec(branch="beside").can_append  # without directions there is no branch
    assert tiny_spec(transform="dense").can_append
    for changes in (
        {"rank": 8, "branch": "beside"}, {"smooth": True}, {"rank": 8, "protected_bits": 8},
        {"transform": "regular", "block": 16}, {"weight_scale": "group"},
    ):  # fmt: skip
        assert not tiny_spec(**changes).can_append, changes
