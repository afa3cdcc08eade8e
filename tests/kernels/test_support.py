import itertools

import pytest
import torch
from tiny_spec import FP4, tiny_spec

from dirotq.kernels import chip as chips
from dirotq.kernels.formats.activation import BITS
from dirotq.kernels.plan import choose
from dirotq.kernels.support import NEWEST, PRODUCTS, unsupported

WIDE = {"dim": 1024, "block": 256, "weight_group": 64, "act_group": 64}


def wide(**changes):
    return tiny_spec(**WIDE | changes)


def test_the_table_has_every_pair_of_elements_that_a_spec_can_have():
    pairs = set()
    sides = itertools.product(
        ("channel", "lm4_channel", "nvfp4"), (4, 8, 16), ("token", "rms", "nvfp4")
    )
    for weights, bits, acts in sides:
        try:
            spec = tiny_spec(weight_scale=weights, act_bits=bits, act_scale=acts)
        except ValueError:
            continue
        pairs.add((spec.weights.element, spec.activations.element))
    assert pairs == PRODUCTS.keys()
    assert {act for _, act in PRODUCTS} | {"lzs"} == BITS.keys()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (FP4["nvfp4"] | {"block": 1024}, "Hadamard block 1024 is larger than 512"),
        (FP4["mxfp4"] | {"smooth": True}, "smoothed activations have no kernel"),
        ({"transform": "regular"}, "regular Hadamard matrices have no kernel"),
        ({"smooth": True}, "smoothed activations have no kernel"),
        ({"act_scale": "lzs"}, "leading bits of 8-bit integers have no kernel"),
        ({"rank": 8, "branch": "beside"}, "beside the whole input has no kernel"),
        ({"rank": 8, "protected_bits": 8}, "8-bit protected branches have no kernel"),
        ({"block": 1024}, "Hadamard block 1024 is larger than 512"),
        ({"dim": 240, "block": 16, "act_scale": "group", "act_group": 24}, "groups of 24 fit no"),
        ({"act_scale": "group", "act_group": 32}, "32 x 1 scales per 1024 columns fit no kernel"),
        ({"dim": 60, "block": 4, "act_bits": 16}, "1 weight scales per 60 columns fit no kernel"),
    ],
)
def test_what_has_no_kernel_says_why_and_runs_as_specified(changes, why):
    spec = wide(**changes)
    assert why in unsupported(spec, NEWEST)
    plan = choose(NEWEST, 64, spec.outputs, spec, torch.bfloat16)
    assert (plan.engine, why in plan.why) == ("reference", True)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"act_scale": "rms"}, {"act_scale": "group"}, {"act_bits": 8}, {"act_bits": 16},
        {"branch": "beside"}, {"protected_bits": 8}, {"block": 512},
        {"act_bits": 16, "act_scale": "group", "act_group": 32},
        FP4["nvfp4"], FP4["mxfp4"] | {"dim": 96, "block": 32},
        {"act_bits": 16, "weight_scale": "nvfp4", "weight_group": 16},
    ],
)  # fmt: skip
def test_what_has_one(changes):
    spec = wide(**changes)
    assert unsupported(spec, chips.OLDEST) is None
    assert choose(80, 64, spec.outputs, spec, torch.bfloat16).engine != "reference"


def test_chips_and_inputs_count():
    floats = wide(act_bits=8, act_scale="rms")
    assert "need FP8 matrix units" in unsupported(floats, 86)
    assert unsupported(floats, 89) is None
    assert "need an NVIDIA GPU" in unsupported(floats, None)
    assert "compute capability 7.5" in unsupported(wide(), 75)
    assert "float32 inputs" in unsupported(wide(), 90, torch.float32)
