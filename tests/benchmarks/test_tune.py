"""`make tune`: which shapes and plans are timed, and the table that it writes."""

import json

import pytest
import torch

from dirotq.benchmarks import tune
from dirotq.benchmarks.tune import Shape, dumped, entries, grid, merged, plans
from dirotq.kernels import plan as plan_module
from dirotq.kernels.plan import TABLE, candidates_for, choose, name_of
from dirotq.tuning.random_linear import FORMATS, spec_for
from dirotq.tuning.timing import Timing

SHAPE = Shape(kind="w4a4", m=4608, n=9216, k=3072)


def timed(shape=SHAPE, chip=90):
    """Every plan of a shape as if the first were the fastest."""
    return [(p, Timing(i, i, i)) for i, p in enumerate(plans(shape, chip), start=1)]


def problems(table):
    """What is wrong with a table of plans."""
    found = []
    for chip, kinds in table.items():
        for kind, rows in kinds.items():
            if kind not in FORMATS:
                found.append(f"{kind}: no such format")
                continue
            for row in rows:
                if set(row) != {"m", "n", "k", "plan", "us"}:
                    found.append(f"{row}: fields")
                    continue
                spec = spec_for(kind, row["k"], row["n"])
                known = candidates_for(int(chip), row["m"], row["n"], spec, torch.bfloat16)
                if row["plan"] not in map(name_of, known):
                    found.append(f"{row}: no such plan on sm_{chip}")
                if not row["us"] > 0:
                    found.append(f"{row}: time")
    return found


def test_the_table_that_is_shipped_holds_plans_that_exist():
    assert problems(json.loads(TABLE.read_text()) if TABLE.is_file() else {}) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"plan": "scaled"}, "no such plan"),
        ({"us": 0}, "time"),
        ({"ms": 1}, "fields"),
    ],
)
def test_problems_are_noticed(change, said):
    row = {"m": 1, "n": 9216, "k": 3072, "plan": "scaled_mm", "us": 9.0} | change
    found = problems({"90": {"w4a4": [row]}})
    assert [said in p for p in found] == [True] * (said is not None)
    assert problems({"90": {"w3a3": [row]}}) == ["w3a3: no such format"]
    assert problems({"80": {"w4a4": [row | {"us": 9.0}]}})  # no FP8 on sm_80


def test_the_grid_holds_every_model_and_can_be_restricted():
    shapes = list(grid(FORMATS))
    assert len(set(shapes)) == len(shapes)
    assert {s.kind for s in shapes} == set(FORMATS)
    assert {3072, 12288, 15360, 1152, 4608, 2240, 5600} <= {s.k for s in shapes}
    assert list(grid(["w4a4"], [4608], [3072], [9216])) == [SHAPE]
    assert list(grid(["w4a16"], [1], [3072])) == [
        Shape(kind="w4a16", m=1, n=n, k=3072) for n in (18432, 9216)
    ]


@pytest.mark.parametrize("chip", [80, 89, 90, 120])
def test_no_shape_loses_all_its_plans(chip):
    for shape in grid(FORMATS):
        spec = spec_for(shape.kind, shape.k, shape.n)
        runs = choose(chip, shape.m, shape.n, spec, torch.bfloat16).engine != "reference"
        assert bool(plans(shape, chip)) == runs, str(shape)


def test_tiles_far_from_the_rows_are_not_timed():
    def heights(m):
        chosen = plans(Shape(kind="w4a4", m=m, n=9216, k=3072), 90)
        return {p.tile.bm for p in chosen if p.tile is not None}

    assert heights(1) == {16}
    assert heights(4608) == {64, 128}


def test_plans_that_take_bf16_alone_bring_their_best_rival():
    ours = timed()
    assert ours[0][0].engine == "scaled_mm"
    first, second = entries(SHAPE, ours)
    assert (first["plan"], second["plan"]) == ("scaled_mm", name_of(ours[1][0]))
    (only,) = entries(SHAPE, ours[1:])
    assert only == {"m": 4608, "n": 9216, "k": 3072, "plan": name_of(ours[1][0]), "us": 2}


def test_the_runtime_finds_what_was_measured(tmp_path, monkeypatch):
    file = tmp_path / "plans.json"
    packed = Shape(kind="w4a4", m=16, n=9216, k=3072)
    slow_library = sorted(timed(packed), key=lambda pair: pair[0].engine == "scaled_mm")
    file.write_text(dumped(merged({}, 90, {SHAPE: timed(), packed: slow_library})))
    assert problems(json.loads(file.read_text())) == []
    monkeypatch.setattr(plan_module, "TABLE", file)
    plan_module._table.cache_clear()
    plan_module.choose.cache_clear()
    try:
        spec = spec_for("w4a4", 3072, 9216)
        many = choose(90, 4096, 9216, spec, torch.bfloat16)
        half = choose(90, 4096, 9216, spec, torch.float16)
        few = choose(90, 20, 9216, spec, torch.bfloat16)
    finally:
        plan_module._table.cache_clear()
        plan_module.choose.cache_clear()
    assert many.engine == "scaled_mm"
    assert name_of(half) == name_of(timed()[1][0])
    assert few.engine == "packed"
    assert "measured at 16 x 3072 -> 9216 on sm_90" in few.why


def test_shapes_that_were_not_timed_keep_their_rows():
    old = {"m": 1, "n": 9216, "k": 3072, "plan": "scaled_mm", "us": 5.0}
    stale = {"m": 4608, "n": 9216, "k": 3072, "plan": "scaled_mm", "us": 999.0}
    table = {"80": {"w4a8": []}, "90": {"w4a16": [], "w4a4": [old, stale]}}
    after = merged(table, 90, {SHAPE: timed()})
    assert after["80"] == {"w4a8": []}
    assert after["90"]["w4a16"] == []
    assert after["90"]["w4a4"] == [old, *entries(SHAPE, timed())]
    assert table["90"]["w4a4"] == [old, stale]
    assert json.loads(dumped(after)) == after


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 1
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_wrong_and_failing_plans_are_skipped_with_a_line(monkeypatch, capsys):
    """On CPU: results stand in for kernels, the clock for the GPU's."""
    shape = Shape(kind="w4a4", m=40, n=48, k=128)
    right, wrong, broken = plans(shape, 90)[:3]
    make, rows = tune.random_linear, tune.random_rows
    monkeypatch.setattr(tune, "random_linear", lambda spec: make(spec, device="cpu"))
    monkeypatch.setattr(tune, "random_rows", lambda m, d: rows(m, d, device="cpu"))
    monkeypatch.setattr(tune, "copies", lambda size: 1)
    monkeypatch.setattr(tune, "time_calls", lambda calls, **_: Timing(1, 1, 1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call(plan, linear, x):
        if plan is broken:
            raise RuntimeError("out of resource: shared memory")
        return lambda: linear(x) * (2 if plan is wrong else 1)

    monkeypatch.setattr(tune, "call", call)
    assert tune.race(shape, [wrong, broken, right]) == [(right, Timing(1, 1, 1))]
    said = capsys.readouterr().out
    assert f"skipped {name_of(wrong)}: wrong result" in said
    assert f"skipped {name_of(broken)}: out of resource" in said
