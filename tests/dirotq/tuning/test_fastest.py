"""Which plans of a shape are timed, what a wrong one costs, and the rows that come of it."""

import pytest
import torch

from dirotq.kernels.plan import Plan, candidates_for, choose, containers, name_of
from dirotq.tuning import fastest
from dirotq.tuning.fastest import Shape, entries, plans, race
from dirotq.tuning.random_linear import FORMATS, random_linear, random_rows, spec_for
from dirotq.tuning.shapes import grid
from dirotq.tuning.timing import Timing

SHAPE = Shape(spec_for("w4a4", 3072, 9216), 4608)


def timed(shape=SHAPE, chip=90):
    """Every plan of a shape as if the first were the fastest."""
    return [(p, Timing(i, i, i)) for i, p in enumerate(plans(shape, chip), start=1)]


@pytest.mark.parametrize("chip", [80, 89, 90, 100, 120])
def test_no_shape_loses_all_its_plans(chip):
    for shape in grid(FORMATS):
        runs = choose(chip, shape.m, shape.spec.outputs, shape.spec, torch.bfloat16)
        assert bool(plans(shape, chip)) == (runs.engine != "reference"), str(shape)


def test_both_containers_are_timed_where_both_work():
    for chip, count in ((80, 1), (89, 2), (90, 1), (120, 2)):
        found = {plan.container for plan in plans(SHAPE, chip)}
        assert found == set(containers(chip, SHAPE.spec)) and len(found) == count


def test_tiles_far_from_the_rows_are_not_timed():
    def heights(m):
        chosen = plans(Shape(SHAPE.spec, m), 90)
        return {p.tile.bm for p in chosen if p.tile is not None}

    assert heights(1) == {16}
    assert heights(4608) == {64, 128}


def test_floats_are_measured_as_four_bits_are():
    floats = Shape.of(_floats(SHAPE.spec), 4608)
    assert floats.key == SHAPE.key
    assert floats.spec.activations.element == "int4"
    assert Shape.of(SHAPE.spec, 1).spec is SHAPE.spec


def _floats(spec):
    return type(spec).from_dict(spec.to_dict() | {"act_bits": 8, "act_scale": "rms"})


def test_plans_that_some_calls_cannot_take_bring_their_best_rival():
    ours = timed()
    assert ours[0][0].engine == "scaled_mm"
    first, second = entries(SHAPE, ours)
    assert (first["plan"], second["plan"]) == ("scaled_mm", name_of(ours[1][0]))
    (only,) = entries(SHAPE, ours[1:])
    assert only == {"m": 4608, "n": 9216, "k": 3072, "plan": name_of(ours[1][0]), "us": 2}


def test_where_int8_wins_floats_have_rows_too():
    ours = sorted(timed(chip=89), key=lambda pair: pair[0].container != "int8")
    found = entries(SHAPE, ours)
    triton = next(p for p, _ in ours if p.container == "fp8" and p.engine != "scaled_mm")
    assert [row["plan"] for row in found] == [name_of(ours[0][0]), "scaled_mm", name_of(triton)]
    spec = _floats(SHAPE.spec)
    known = [name_of(p) for p in candidates_for(89, 4608, 9216, spec, torch.float16)]
    assert any(row["plan"] in known for row in found)


def test_where_humming_wins_everybody_without_it_has_a_row_too():
    humming = (Plan(engine="humming", container="int8"), Timing(0.4, 0.5, 0.6))
    ours = timed()
    found = [row["plan"] for row in entries(SHAPE, [humming, *ours])]
    assert found == ["humming", "scaled_mm", name_of(ours[1][0])]
    assert [row["plan"] for row in entries(SHAPE, [*ours, humming])] == found[1:]


@pytest.fixture
def on_cpu(monkeypatch):
    """Results stand in for kernels, the clock for the GPU's."""
    make, rows = random_linear, random_rows
    monkeypatch.setattr(fastest, "random_linear", lambda spec: make(spec, device="cpu"))
    monkeypatch.setattr(fastest, "random_rows", lambda m, d: rows(m, d, device="cpu"))
    monkeypatch.setattr(fastest, "copies", lambda size: 1)
    monkeypatch.setattr(fastest, "time_calls", lambda calls, **_: Timing(1, 1, 1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_wrong_and_failing_plans_are_told_and_passed_over(on_cpu, monkeypatch):
    shape = Shape(spec_for("w4a4", 128, 48), 40)
    right, wrong, broken = plans(shape, 90)[:3]

    def call(plan, linear, x):
        if plan is broken:
            raise RuntimeError("out of resource: shared memory")
        return lambda: linear(x) * (2 if plan is wrong else 1)

    monkeypatch.setattr(fastest, "call", call)
    told = {}
    found = race(shape, [wrong, broken, right], told.__setitem__)
    assert found == [(right, Timing(1, 1, 1))]
    assert told.keys() == {wrong, broken}
    assert "wrong result" in told[wrong]
    assert told[broken] == "RuntimeError: out of resource: shared memory"


def test_a_lost_context_ends_the_race(on_cpu, monkeypatch):
    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(fastest, "call", lambda *_: lost)
    shape = Shape(spec_for("w4a4", 128, 48), 40)
    plan = plans(shape, 90)[0]
    with pytest.raises(RuntimeError, match=f"{name_of(plan)} on w4a4 128 -> 48, M = 40 broke"):
        race(shape, [plan], lambda plan, why: None)
