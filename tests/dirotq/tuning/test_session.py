"""What is kept of a measurement that fails here and there, runs out of time, or is interrupted."""

import math

import pytest
import torch

from dirotq.kernels.plan import name_of
from dirotq.tuning import session
from dirotq.tuning.fastest import Shape, entries
from dirotq.tuning.random_linear import spec_for
from dirotq.tuning.session import Outcome, measure, merged, missing
from dirotq.tuning.timing import Timing

SHAPES = [Shape(spec_for("w4a4", 3072, n), m) for n in (9216, 3072) for m in (4608, 16)]


class Bench:
    """A GPU that is not there: the later a candidate, the slower it is."""

    def __init__(self):
        self.table, self.seen, self.said = {}, [], []

    def by(self, shape, candidates, failed):
        self.seen.append(shape)
        return [(p, Timing(i, i, i)) for i, p in enumerate(candidates, start=1)]

    def keep(self, shape, rows):
        self.table = merged(self.table, shape, rows)

    def measure(self, shapes=SHAPES, deadline=math.inf, **more):
        options = {"by": self.by, "keep": self.keep, "say": self.said.append} | more
        return measure(shapes, 90, deadline=deadline, **options)


@pytest.fixture
def bench():
    return Bench()


def test_every_shape_is_kept_and_said(bench):
    outcome = bench.measure()
    assert (outcome.measured, outcome.left, outcome.without, outcome.failed) == (4, 0, 0, {})
    assert missing(SHAPES, bench.table) == []
    assert bench.said[0].startswith("[1/4] w4a4 3072 -> 9216, M = 4608: 1.0 us scaled_mm; then 2.0")
    assert bench.said[3].startswith("[4/4, 0:00 left] w4a4 3072 -> 3072, M = 16: ")
    assert str(outcome) == "4 shapes measured"


def test_a_shape_is_kept_before_the_next_one_begins(bench):
    def stopped(shape, candidates, failed):
        if len(bench.seen) == 2:
            raise KeyboardInterrupt
        return Bench.by(bench, shape, candidates, failed)

    with pytest.raises(KeyboardInterrupt):
        bench.measure(by=stopped)
    left = missing(SHAPES, bench.table)
    assert left == SHAPES[2:]
    bench.seen.clear()
    bench.measure(left)
    assert bench.seen == SHAPES[2:]
    assert missing(SHAPES, bench.table) == []


def test_after_the_deadline_nothing_is_begun(bench, monkeypatch):
    clock = iter([0.0, 1.0, 9.9, 10.1])
    monkeypatch.setattr(session.time, "monotonic", lambda: next(clock))
    outcome = bench.measure(deadline=10.0)
    assert (outcome.measured, outcome.left) == (2, 2)
    assert str(outcome) == "2 shapes measured, 2 left"


def test_a_kernel_that_fails_is_said_once_and_counted(bench):
    def by(shape, candidates, failed):
        failed(candidates[0], "out of resource: shared memory")
        return Bench.by(bench, shape, candidates[1:], failed)

    outcome = bench.measure(by=by)
    assert outcome.measured == 4
    assert sum("skipped scaled_mm: out of resource" in line for line in bench.said) == 1
    assert set(outcome.failed.values()) == {"out of resource: shared memory"}
    kernels = len(outcome.failed)
    assert str(outcome) == f"4 shapes measured; {kernels} kernels skipped"


def test_a_shape_that_nothing_runs_is_no_end(bench):
    def by(shape, candidates, failed):
        if shape == SHAPES[0]:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        return [] if shape == SHAPES[1] else Bench.by(bench, shape, candidates, failed)

    outcome = bench.measure(by=by)
    assert (outcome.measured, outcome.without) == (2, 2)
    assert f"{SHAPES[0]}: the GPU's memory does not hold it" in bench.said
    assert str(outcome) == "2 shapes measured, 2 without a kernel that runs"
    assert missing(SHAPES, bench.table) == SHAPES[:2]


def test_a_format_without_kernels_is_not_even_drawn(bench):
    regular = spec_for("w4a4", 3072, 9216).to_dict() | {"transform": "regular"}
    shape = Shape(type(SHAPES[0].spec).from_dict(regular), 16)
    assert session.plans(shape, 90) == []
    assert bench.measure([shape]).without == 1
    assert bench.seen == []


def test_shapes_that_were_not_timed_keep_their_rows():
    old = {"m": 1, "n": 9216, "k": 3072, "plan": "scaled_mm", "us": 5.0}
    stale = {"m": 4608, "n": 9216, "k": 3072, "plan": "scaled_mm", "us": 999.0}
    table = {"w4a16": [], "w4a4": [stale, old]}
    found = [(p, Timing(i, i, i)) for i, p in enumerate(session.plans(SHAPES[0], 90), start=1)]
    after = merged(table, SHAPES[0], entries(SHAPES[0], found))
    assert after["w4a16"] == []
    assert after["w4a4"] == [old, *entries(SHAPES[0], found)]
    assert after["w4a4"][1]["plan"] == name_of(found[0][0])
    assert table["w4a4"] == [stale, old]


def test_missing_looks_at_kind_and_every_size():
    table = {"w4a4": [{"m": 4608, "n": 9216, "k": 3072}]}
    assert missing(SHAPES, table) == SHAPES[1:]
    assert missing(SHAPES, {"w4a8": table["w4a4"]}) == SHAPES
    assert Outcome().failed is not Outcome().failed
