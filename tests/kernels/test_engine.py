"""Every plan computes what the specification says; in the interpreter where there is no GPU.

Inputs are such that all codes are exact (tests/support/exact.py): what is left is how the product
is made, and only its rounding may differ. ``torch._scaled_mm`` is replaced by a product in float64
of the very tensors it gets, but for the sum that is what it computes.
"""

import pytest
import torch
from exact import exact_case
from formats import DEVICE, inputs, random_linear, spec_of
from formats import FORMATS as EVERY
from scaled_mm import emulated
from tiny_spec import tiny_spec
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton")

from dirotq.kernels import engine
from dirotq.kernels.plan import Plan, candidates_for, name_of

HALF = torch.float16
# What two FP8 numbers hold of a value; the interpreter may halve the second (test_unpack_w4.py).
TWO_FP8 = 2.0**-7 if DEVICE.type == "cuda" else 2.0**-5
SHAPE = {"dim": 192, "rows": (48,), "block": 16, "act_group": 64, "weight_group": 64}
FORMATS = {
    "pow2": tiny_spec(**SHAPE, rank=24, act_scale="pow2"),
    "token": tiny_spec(**SHAPE),
    "w4a8": tiny_spec(**SHAPE, rank=8, act_bits=8),
    "groups": tiny_spec(**SHAPE, rank=8, act_scale="group", weight_scale="group"),
    "weight-groups": tiny_spec(**SHAPE, rank=8, weight_scale="group"),
    "w4a8-groups": tiny_spec(**SHAPE, rank=8, act_bits=8, act_scale="group"),
    "lm4": tiny_spec(**SHAPE, rank=24, act_scale="pow2", weight_scale="lm4_channel"),
    "lm4-w4a8": tiny_spec(**SHAPE, rank=8, act_bits=8, weight_scale="lm4_channel"),
}
SIXTEEN = {
    "w4a16": tiny_spec(**SHAPE, act_bits=16, weight_scale="group"),
    "w4a16-protected": tiny_spec(**SHAPE, act_bits=16, weight_scale="group", rank=8),
    "w4a16-channel": tiny_spec(**SHAPE, act_bits=16),
    "lm4-w4a16": tiny_spec(**SHAPE, act_bits=16, weight_scale="lm4_group"),
}


@pytest.fixture(autouse=True)
def library_product(monkeypatch):
    if DEVICE.type == "cpu":
        monkeypatch.setattr(torch, "_scaled_mm", emulated)


def cases(specs, chips, rows=5):
    """Each plan once, and for fp16 inputs too the ones that the library takes in bf16 only."""
    found = {}
    for name, spec in specs.items():
        for chip in chips:
            for plan in candidates_for(chip, rows, spec.outputs, spec, torch.bfloat16):
                found[f"{name}-{name_of(plan)}"] = (spec, plan)
    return [pytest.param(*case, id=key) for key, case in found.items()]


@pytest.mark.parametrize(
    ("spec", "plan"),
    cases({n: FORMATS[n] for n in ("pow2", "w4a8", "groups", "w4a8-groups")}, (90,))
    + cases({"pow2-int8": FORMATS["pow2"]}, (80,))[:2]
    + cases({n: FORMATS[n] for n in ("token", "weight-groups")}, (90,))[:2]
    + cases({"lm4": FORMATS["lm4"]}, (90,))[:2]
    + cases({"lm4-w4a8": FORMATS["lm4-w4a8"]}, (90,))[:1],
)
def test_every_plan(spec, plan, empty_is):
    module = random_linear(spec)
    x, p, _, _ = exact_case(spec, 5)
    if p is not None:
        module.basis.copy_(p)
    want = engine.reference(x.double(), module.packed(), spec)
    with empty_is(255):
        got = engine.linear(plan, x, module.packed(), spec)
    assert got.dtype == HALF
    # fp16 rounds y; as FP8 columns the protected branch and the bias keep eight bits.
    bound = 2.0**-10 * (want.abs() + 0.01 * want.abs().amax(1, keepdim=True))
    if plan.engine == "scaled_mm":
        bound += TWO_FP8 * module.bias.double().abs() + module.wscale.double().T / 64
        if p is not None:
            bound += TWO_FP8 * (x.double() @ p.double()).abs() @ module.wp.double().abs().T
    assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize(("spec", "plan"), cases(SIXTEEN, (90,), rows=3))
def test_every_plan_of_sixteen_bit_activations(spec, plan, empty_is):
    module, x = random_linear(spec), inputs(3, 192, HALF)
    want = engine.reference(x.double(), module.packed(), spec)
    with empty_is(255):
        got = engine.linear(plan, x, module.packed(), spec)
    assert got.dtype == HALF
    assert (got.double() - want).norm() <= 2.0**-9 * want.norm()


@pytest.mark.parametrize("act_scale", ["token", "pow2", "group"])
@pytest.mark.parametrize("weight_scale", ["channel", "group"])
def test_dense_rotation(act_scale, weight_scale):
    groups = {"act_scale": act_scale, "weight_scale": weight_scale, "act_group": 64}
    spec = tiny_spec(dim=160, rows=(48,), rank=24, transform="dense", weight_group=64, **groups)
    module, x = random_linear(spec), inputs(64, 160, HALF)
    plan = candidates_for(90, 64, 48, spec, HALF)[0]
    want = engine.reference(x.double(), module.packed(), spec)
    plain = engine.reference(x, module.packed(), spec).double() - want
    got = engine.linear(plan, x, module.packed(), spec).double() - want
    assert got.norm() < 2 * plain.norm() + 2.0**-10 * want.norm()


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("name", ["scaled_mm", "packed", "unpacked"])
def test_scales_of_the_root_mean_square(name, act_bits):
    """4-bit codes, and 8-bit floats, which take the same products."""
    spec = tiny_spec(dim=320, rows=(48,), rank=24, block=64, act_scale="rms", act_bits=act_bits)
    module, x = random_linear(spec), inputs(64, 320, HALF)
    found = candidates_for(90, 64, 48, spec, torch.bfloat16)
    assert {plan.container for plan in found} == {"fp8"}
    plan = next(plan for plan in found if plan.engine == name)
    want = engine.reference(x.double(), module.packed(), spec)
    plain = engine.reference(x, module.packed(), spec).double() - want
    got = engine.linear(plan, x, module.packed(), spec).double() - want
    assert got.norm() < 2 * plain.norm() + 2.0**-9 * want.norm()


@pytest.mark.parametrize("name", ["scaled_mm", "packed", "unpacked"])
def test_rank_beyond_the_kernels(name):
    spec = tiny_spec(dim=320, rows=(48,), rank=264, block=64, act_scale="pow2", act_group=64)
    module, x = random_linear(spec), inputs(64, 320, HALF)
    found = candidates_for(90, 64, 48, spec, torch.bfloat16)
    plan = next(plan for plan in found if plan.engine == name)
    want = engine.reference(x.double(), module.packed(), spec)
    plain = engine.reference(x, module.packed(), spec).double() - want
    got = engine.linear(plan, x, module.packed(), spec).double() - want
    assert got.norm() < 2 * plain.norm() + 2.0**-9 * want.norm()


@pytest.mark.parametrize("width", [128, 192])
@pytest.mark.parametrize("bias", [True, False])
def test_nothing_protected(width, bias):
    """Rank 0, with and without a bias: there may be no appended columns at all."""
    spec = tiny_spec(dim=width, rows=(48,), act_group=64)
    module, (x, *_) = random_linear(spec, bias=bias), exact_case(spec, 5)
    want = engine.reference(x.double(), module.packed(), spec)
    for plan in (Plan(engine="scaled_mm", container="fp8"), *packed_and_unpacked(spec)):
        got = engine.linear(plan, x, module.packed(), spec).double()
        assert (got - want).norm() <= 2.0**-8 * want.norm(), plan


def packed_and_unpacked(spec) -> list[Plan]:
    found = candidates_for(90, 5, spec.outputs, spec, HALF)
    return [next(p for p in found if p.engine == name) for name in ("packed", "unpacked")]


def test_columns_that_do_not_touch():
    spec = FORMATS["pow2"]
    module, (x, p, *_) = random_linear(spec), exact_case(spec, 5)
    module.basis.copy_(p)
    wide = torch.stack([x, x.new_full(x.shape, torch.nan)], -1).flatten(1)
    for plan in packed_and_unpacked(spec):
        want = engine.linear(plan, x, module.packed(), spec)
        assert torch.equal(engine.linear(plan, wide[:, ::2], module.packed(), spec), want)


@pytest.mark.parametrize("name", FORMATS)
def test_no_rows(name):
    spec = FORMATS[name]
    module = random_linear(spec)
    x = inputs(1, 192, HALF)[:0]
    for plan in (
        candidates_for(90, 1, 48, spec, HALF)[0],
        Plan(engine="reference", container="none"),
    ):
        assert engine.linear(plan, x, module.packed(), spec).shape == (0, 48)


class MadeOnTheHost(TorchFunctionMode):
    """Where tensors are made of Python's numbers, which a GPU gets as copies from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            self.found.append(str(args))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", EVERY)
def test_the_specification_makes_nothing_on_the_host(name):
    """CUDA graphs don't record such copies, and float32 runs on it behind graphs."""
    spec = spec_of(name, 320, 48)
    packed, x = random_linear(spec).packed(), inputs(5, 320, torch.float32)
    engine.reference(x, packed, spec)  # matrices that are kept are made once
    with MadeOnTheHost() as seen:
        engine.reference(x, packed, spec)
    assert seen.found == []
