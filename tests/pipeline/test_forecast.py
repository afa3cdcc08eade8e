"""What plan says of several workers: a simulation with the seconds that units took."""

import json
from functools import partial

import pytest
from toy_units import Parts

from dirotq.pipeline import dag, forecast
from dirotq.pipeline.build import Pipeline
from dirotq.pipeline.executor import LocalExecutor
from dirotq.pipeline.forecast import makespan
from dirotq.pipeline.history import Took, took
from dirotq.pipeline.preflight import Preflight
from dirotq.pipeline.workplace import few_at_a_time


def one(left, idle):
    return 1


def equal(left, idle):
    return -(-left // idle)


@pytest.mark.parametrize(
    ("seconds", "workers", "helping", "wanted"),
    [
        ([], 3, one, 0.0),
        ([1.0] * 6, 1, one, 6.0),
        ([1.0] * 6, 2, one, 3.0),
        ([1.0] * 6, 4, one, 2.0),
        ([1.0] * 6, 100, one, 1.0),
        ([1.0, 1.0, 5.0], 2, one, 6.0),
        ([5.0, 1.0, 1.0], 2, one, 5.0),
        ([1.0] * 5, 2, equal, 3.0),
        ([3.0, 1.0, 1.0, 1.0], 2, equal, 4.0),  # a job's share is fixed
        ([1.0] * 64, 2, partial(lambda left, idle, w: few_at_a_time(left, w), w=2), 32.0),
    ],
)
def test_the_last_unit(seconds, workers, helping, wanted):
    assert makespan(seconds, workers, helping) == pytest.approx(wanted)


def test_what_is_no_unit_is_not_shared_out():
    """10 s in all: 8 s of units, 1 s to open what they are made from, 1 s to merge."""
    past = Took(10.0, 0, 0, 0, units=(2.0,) * 4, wall=9.0)
    found = forecast.forecast(past, 2, one)
    assert (found.alone, found.shared, found.rest, found.longest) == (10.0, 6.0, 2.0, 2.0)
    two = Took(6.0, 0, 0, 0, units=(2.0,) * 4, wall=5.0, workers=2)
    assert forecast.forecast(two, 4, one).shared == 4.0
    whole = forecast.forecast(Took(7.0, 0, 0, 0), 8, one)
    assert (whole.units, whole.alone, whole.shared, whole.rest) == (0, 7.0, 7.0, 7.0)


@pytest.fixture
def line(tmp_path, store):
    (tmp_path / "ledger").mkdir()
    stage = Parts(count=6, ledger=str(tmp_path / "ledger"), pause=0.05)
    steps = dag.plan({"parts": stage}, {"parts": {}})
    return lambda **given: Pipeline(steps, store, LocalExecutor(**given), frozenset())


def test_a_run_keeps_what_its_units_took_and_plan_reads_it(line, store, capsys):
    dag.run(line().steps, store, LocalExecutor())
    (artifact,) = store.list()
    seconds = artifact.provenance["units"]["seconds"]
    assert len(seconds) == 6 and 0.05 <= min(seconds) <= max(seconds) < 2
    assert sum(seconds) <= artifact.provenance["units"]["wall"] <= artifact.provenance["seconds"]
    forecast.show(line(), Preflight())
    assert capsys.readouterr().out == ""  # one process shares nothing out
    forecast.show(line(workers=3), Preflight())
    out = capsys.readouterr().out
    assert "3 workers" in out
    name, count, alone, shared, longest, rest = out.splitlines()[2].split()
    assert (name, count) == ("parts", "6")
    assert float(shared) < float(alone) and float(longest) >= 0.05 > float(rest) - 0.5
    assert "seconds by the units' times of the last runs" in out


def test_what_never_ran_is_not_foretold(line, capsys):
    forecast.show(line(workers=2), Preflight())
    assert "no stage has run here before" in capsys.readouterr().out


@pytest.mark.parametrize(
    "nonsense",
    [
        {"seconds": [1.0, "2"], "wall": 3.0},
        {"seconds": [1.0, -2.0], "wall": 3.0},
        {"seconds": [1.0, None], "wall": 3.0},
        {"seconds": [], "wall": 0.0},
        {"seconds": [1.0], "wall": 1e9},
        {"seconds": 5, "wall": 3.0},
        [1.0],
    ],
)
def test_nonsense_of_units_does_not_count(line, store, nonsense):
    dag.run(line().steps, store, LocalExecutor())
    (artifact,) = store.list()
    file = artifact.path / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"units": nonsense}))
    (again,) = store.list()
    found = took(again)
    assert found and found.units == () and found.workers == 1
