"""Which plan a linear takes, per chip, format and shape."""

import itertools
import json

import pytest
import torch
from formats import FORMATS, spec_of
from tiny_spec import FP4, tiny_spec

from dirotq.kernels import chip as chips
from dirotq.kernels import measured
from dirotq.kernels import plan as plans
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.fp4_linear import tiles as fp4
from dirotq.kernels.plan import (
    Plan,
    candidates_for,
    choose,
    containers,
    kind_of,
    name_of,
    unmeasured,
)
from dirotq.kernels.w4a4_linear.tiles import fits
from dirotq.kernels.w4a16_linear import tiles as w4a16

CHIPS = (80, 86, 89, 90, 100, 103, 120)
BF16, FP16 = torch.bfloat16, torch.float16
SPECS = {name: spec_of(name, 2240, 1008) for name in FORMATS}


@pytest.fixture
def table(monkeypatch, tmp_path):
    """``table({"90": {"w4a4": [...]}})`` in place of plans.json."""

    def install(content: dict) -> None:
        file = tmp_path / "plans.json"
        file.write_text(json.dumps(content))
        monkeypatch.setattr(measured, "TABLE", file)
        monkeypatch.setattr(measured, "gpu_of", lambda chip: None)  # whoever tuned their own
        plans.renew()

    yield install
    monkeypatch.undo()
    plans.renew()


@pytest.fixture
def unmeasured_chips(table):
    table({})


def variant_of(plan: Plan, spec: QuantSpec) -> str:
    if "group" in (spec.activations.granularity, spec.weights.granularity):
        return "grouped"
    assert plan.tile is not None
    return "tma" if plan.tile.tma else plan.engine


def assert_runs(plan: Plan, chip: int, m: int, n: int, spec: QuantSpec, dtype) -> None:
    """The plan is one that this chip can run."""
    if spec.activations.element == "e4m3" and chip < 89:
        assert plan.engine == "reference" and "FP8 matrix units" in plan.why
        return
    assert plan.engine != "reference"
    if spec.weights.element == "e2m1":
        kind = fp4.variant(chip) if spec.activations.bits == 4 else "decoded"
        assert (plan.engine, plan.container) == ("fp4", "none")
        assert plan.tile in fp4.TILES[kind] and fp4.fits(plan.tile, kind, chip, spec.width)
        return
    if spec.activations.bits == 16:
        assert plan.engine == "w4a16" and plan.container == "none" and plan.tile is not None
        assert chip in w4a16.WIDE_CHIPS or plan.tile not in w4a16.TILES["wide"]
        assert m <= 4 or plan.tile.kind == "dots"
        return
    fp8 = plan.container == "fp8"
    assert plan.container in containers(chip, spec)
    assert plan.dtype == (torch.float8_e4m3fn if fp8 else torch.int8)
    if plan.engine == "scaled_mm":
        assert fp8 and dtype == BF16 and n % 16 == 0
        assert spec.activations.name != "group" and spec.weights.granularity == "channel"
    else:
        assert plan.tile is not None
        assert fits(plan.tile, variant_of(plan, spec), chip, fp8=fp8)


@pytest.mark.parametrize("name", SPECS)
def test_every_format_has_a_plan_that_its_chip_runs(name):
    spec = SPECS[name]
    for chip, dtype, m in itertools.product(CHIPS, (BF16, FP16), (1, 4, 5, 16, 33, 256, 4608)):
        for n in (1008, 1000, 1):
            assert_runs(choose(chip, m, n, spec, dtype), chip, m, n, spec, dtype)
            found = candidates_for(chip, m, n, spec, dtype)
            for plan in found:
                assert_runs(plan, chip, m, n, spec, dtype)
            names = [name_of(plan) for plan in found]
            assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("chip", "why"),
    [
        (None, "need an NVIDIA GPU"),
        (61, "capability 6.1; the kernels need 8.0"),
        (75, "capability 7.5; the kernels need 8.0"),
    ],
)
def test_chips_without_the_kernels(name, chip, why):
    plan = choose(chip, 33, 1008, SPECS[name], BF16)
    assert plan.engine == "reference"
    assert why in plan.why


def test_without_triton(monkeypatch):
    chips.why_reference.cache_clear()
    monkeypatch.setattr(chips, "find_spec", lambda name: None)
    try:
        plan = choose.__wrapped__(90, 33, 1008, SPECS["pow2"], BF16)
    finally:
        chips.why_reference.cache_clear()
    assert plan.engine == "reference"
    assert "pip install triton" in plan.why


@pytest.mark.parametrize("group", [64, 128])
def test_groups_of_64_and_128_have_kernels(group):
    groups = {"weight_scale": "group", "weight_group": group, "act_group": group}
    for act in ({"act_scale": "group"}, {"act_scale": "group", "act_bits": 8}, {"act_bits": 16}):
        plan = choose(90, 33, 1008, tiny_spec(dim=3072, rank=64, **groups, **act), BF16)
        assert plan.engine != "reference"


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (tiny_spec(dim=1024, block=1024), "block 1024 is larger than 512"),
        (tiny_spec(dim=96, act_scale="pow2", act_group=48), "groups of 48 fit no kernel; 16, 32"),
        (tiny_spec(dim=64, act_scale="group", act_group=32), "2 x 1 scales per 64 columns"),
        (tiny_spec(dim=64, weight_scale="group", weight_group=32), "1 x 2 scales per 64"),
        (tiny_spec(dim=60), "1 x 1 scales per 60 columns"),
        (tiny_spec(dim=60, act_bits=16), "1 weight scales per 60 columns"),
        (tiny_spec(act_bits=16, weight_scale="group"), "4 weight scales per 64 columns"),
        (tiny_spec(dim=1024, block=1024, **FP4["mxfp4"]), "block 1024 is larger than 512"),
    ],
)
def test_formats_that_fit_no_kernel_say_why(spec, why):
    plan = choose(90, 33, 48, spec, BF16)
    assert plan.engine == "reference"
    assert why in plan.why


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_inputs_are_computed_as_specified(dtype):
    plan = choose(90, 33, 1008, SPECS["pow2"], dtype)
    assert plan.engine == "reference"
    assert str(dtype).removeprefix("torch.") in plan.why


def test_rules_of_an_unmeasured_chip(unmeasured_chips):
    def engine(chip, m, name="pow2", dtype=BF16, n=1008):
        return choose(chip, m, n, SPECS[name], dtype).engine

    assert engine(90, 4608) == "scaled_mm"
    assert engine(90, 16) == "packed"
    assert engine(90, 4608, n=1000) == "packed"  # the library takes multiples of 16
    assert engine(90, 4608, dtype=FP16) == "packed"
    assert engine(80, 4608) == "packed"
    assert engine(90, 4608, "w4a8") == "packed"
    assert engine(90, 4608, "groups") == "packed"
    for rows, few in ((1, True), (16, True), (4608, False)):
        tile = choose(90, rows, 1008, SPECS["pow2"], FP16).tile
        assert (tile.bm <= 16) == few
    assert [choose(80, m, 1008, SPECS["w4a16"], BF16).tile.bm for m in (1, 16, 17)] == [1, 16, 64]
    for chip in CHIPS:
        rows = [choose(chip, m, 1008, SPECS["nvfp4"], BF16).tile.bm for m in (1, 16, 64, 4608)]
        assert rows == [16, 16, 64, 128]
    assert "no measurement for sm_80" in choose(80, 33, 1008, SPECS["pow2"], BF16).why


def test_a_shape_takes_its_nearest_neighbours_plan(table):
    few = unmeasured(90, 16, candidates_for(90, 16, 3072, SPECS["pow2"], BF16))
    rows = [
        {"m": 16, "n": 3072, "k": 3072, "plan": name_of(few)},
        {"m": 4096, "n": 3072, "k": 3072, "plan": "scaled_mm"},
        {"m": 4096, "n": 3072, "k": 3072, "plan": "of another time"},
    ]
    table({"90": {"w4a4": rows}})

    def chosen(m, **more):
        return choose(more.pop("chip", 90), m, 1008, SPECS["pow2"], more.pop("dtype", BF16))

    assert chosen(1).tile == chosen(200).tile == few.tile
    assert chosen(300).engine == chosen(20000).engine == "scaled_mm"
    assert chosen(300).why == "measured at 4096 x 3072 -> 3072 on sm_90"
    # Where the measured plan can't run, the rules or the next measurement do.
    assert chosen(4096, dtype=FP16).tile == few.tile
    assert "no measurement for sm_100" in chosen(16, chip=100).why


@pytest.mark.parametrize(
    ("other", "nearer"),
    [
        ({"m": 4096}, {"m": 17}),
        ({"n": 8192}, {"n": 1009}),
        ({"k": 16384}, {"k": 2241}),
    ],
    ids=["rows", "outputs", "width"],
)
def test_each_size_of_a_shape_decides_who_is_near(table, other, nearer):
    """Two measurements that differ in one size alone, in both orders of the table."""
    spec = SPECS["pow2"]
    packed = [p for p in candidates_for(90, 16, 1008, spec, BF16) if p.engine == "packed"]
    want = {"m": 16, "n": 1008, "k": spec.width}
    rows = [
        want | other | {"plan": name_of(packed[0])},
        want | nearer | {"plan": name_of(packed[1])},
    ]
    for order in (rows, rows[::-1]):
        table({"90": {"w4a4": order}})
        assert choose(90, 16, 1008, spec, BF16).tile == packed[1].tile


def test_the_shipped_table_names_plans_that_exist(monkeypatch):
    monkeypatch.setattr(plans.humming, "missing", lambda: None)
    specs: dict[str, QuantSpec] = {}
    for spec in SPECS.values():
        specs.setdefault(kind_of(spec), spec)
    for chip, kinds in measured.shipped().items():
        for kind, rows in kinds.items():
            for row in rows:
                found = candidates_for(int(chip), row["m"], row["n"], specs[kind], BF16)
                assert row["plan"] in map(name_of, found), (chip, kind, row)


def test_no_rows_take_the_plan_of_one():
    assert choose(90, 0, 1008, SPECS["pow2"], BF16) == choose(90, 1, 1008, SPECS["pow2"], BF16)


def test_kinds():
    assert {kind_of(spec) for spec in SPECS.values()} == {
        "w4a4", "w4a4-grouped", "w4a8", "w4a8-grouped", "w4a16",
        "w4a4-nvfp4", "w4a4-mxfp4", "w4a16-nvfp4", "w4a16-mxfp4",
    }  # fmt: skip


def test_a_plan_says_what_it_is():
    plan = choose(80, 33, 1008, SPECS["pow2"], BF16)
    assert str(plan).startswith("packed on INT8 codes, tile ")
    assert f"({plan.why})" in str(plan)
    assert str(choose(100, 64, 1008, SPECS["nvfp4"], BF16)).startswith("fp4, tile 64 x 128 (")
    reference = choose(None, 33, 1008, SPECS["pow2"], BF16)
    assert str(reference) == "reference (the kernels need an NVIDIA GPU)"


def test_floats_need_fp8_matrix_units():
    spec = tiny_spec(dim=1024, rank=64, act_scale="rms", act_bits=8)
    assert choose(80, 4096, 1008, spec, BF16).engine == "reference"
    assert "compute capability 8.9" in choose(86, 4096, 1008, spec, BF16).why
    assert choose(90, 4096, 1008, spec, BF16).container == "fp8"
    assert choose(80, 4096, 1008, tiny_spec(dim=1024, act_scale="rms"), BF16).container == "int8"


FLOATS = tiny_spec(dim=1024, rank=64, act_scale="rms", act_bits=8)


def test_levels_take_the_products_of_integers(monkeypatch):
    """But for one that reads integers itself, and a tile that leaves no registers for tables."""
    monkeypatch.setattr(plans.humming, "missing", lambda: None)
    for name, like in (("lm4", "rms"), ("lm4-floats", "floats"), ("lm4-w4a8", "w4a8")):
        for chip in CHIPS:
            ours, theirs = (
                [name_of(p) for p in candidates_for(chip, 4608, 1024, SPECS[n], BF16)]
                for n in (name, like)
            )
            assert "humming" not in ours
            assert ours == [plan for plan in theirs if plan != "humming"]
    assert "humming" in [name_of(p) for p in candidates_for(90, 4608, 1024, SPECS["rms"], BF16)]
    few = [p.tile for p in candidates_for(90, 4, 1024, SPECS["lm4-w4a16"], BF16)]
    more = [p.tile for p in candidates_for(90, 4, 1024, SPECS["w4a16"], BF16)]
    assert [t for t in more if t not in few] == [w4a16.TILES["wide"][2]]
    assert not w4a16.takes_tables(w4a16.TILES["wide"][2])
    assert all(map(w4a16.takes_tables, few))


@pytest.mark.parametrize(
    ("chip", "four_bits", "floats"),
    [
        (80, ("int8",), None),
        (86, ("int8",), None),
        (89, ("int8", "fp8"), ("fp8",)),
        (90, ("fp8",), ("fp8",)),
        (100, ("fp8",), ("fp8",)),
        (103, ("fp8",), ("fp8",)),
        (120, ("int8", "fp8"), ("fp8",)),
        (121, ("int8", "fp8"), ("fp8",)),
    ],
)
def test_containers_follow_the_rates_of_the_chip(chip, four_bits, floats, unmeasured_chips):
    """The first is the default; the others are candidates, as measurement may choose them."""
    for name in ("pow2", "rms", "token", "groups", "dense"):
        found = candidates_for(chip, 4608, 1008, SPECS[name], BF16)
        assert containers(chip, SPECS[name]) == four_bits
        assert {plan.container for plan in found} == set(four_bits), name
        for m in (1, 16, 4608):
            assert choose(chip, m, 1008, SPECS[name], BF16).container == four_bits[0]
    for name in ("w4a8", "w4a8-groups"):
        assert containers(chip, SPECS[name]) == ("int8",)
        assert choose(chip, 4608, 1008, SPECS[name], BF16).container == "int8"
    if floats is not None:
        assert containers(chip, FLOATS) == floats
        assert choose(chip, 4608, 1008, FLOATS, BF16).container == "fp8"


def test_measurement_may_choose_the_other_container(table):
    row = {"m": 4608, "n": 1008, "k": 2240, "plan": "scaled_mm"}
    table({"89": {"w4a4": [row]}})
    assert choose(89, 4096, 1008, SPECS["pow2"], BF16).engine == "scaled_mm"
    assert choose(120, 4096, 1008, SPECS["pow2"], BF16).container == "int8"


def test_rows_that_floats_cannot_run_leave_them_to_the_rules(table):
    int8 = next(p for p in candidates_for(89, 4608, 1008, SPECS["pow2"], BF16) if p.tile)
    assert int8.container == "int8"
    table({"89": {"w4a4": [{"m": 4608, "n": 1008, "k": 2240, "plan": name_of(int8)}]}})
    assert choose(89, 4608, 1008, SPECS["pow2"], BF16).tile == int8.tile
    floats = choose(89, 4608, 1008, FLOATS, BF16)
    assert (floats.container, floats.why) == ("fp8", "no measurement for sm_89")
