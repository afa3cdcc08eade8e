"""Units made on Ray and by SLURM's jobs: the bytes of one process, whoever dies."""

import dataclasses
import logging
import os
from collections import Counter

import pytest
import toy_units
from toy_units import Parts

from dirotq.errors import NumericalError, UnsupportedError
from dirotq.pipeline.divided import in_units
from dirotq.pipeline.units import JOURNAL, Units


@pytest.fixture
def stage(tmp_path):
    (tmp_path / "ledger").mkdir()
    return Parts(count=12, ledger=str(tmp_path / "ledger"))


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def content(out):
    return {
        path.relative_to(out).as_posix(): path.read_text()
        for path in out.rglob("*")
        if path.is_file() and JOURNAL not in path.parts
    }


def alone(stage, out):
    out.mkdir()
    in_units(stage, out, {})
    return content(out)


def test_two_workers_make_each_unit_once_with_the_bytes_of_one(run, stage, tmp_path, out, caplog):
    slow = dataclasses.replace(stage, pause=0.02)
    notes = {}
    with caplog.at_level(logging.INFO):
        assert run(slow, out, {}, notes) == {"parts": 12}
    begun = stage.begun()
    assert Counter(unit for unit, _ in begun) == Counter(stage.units())
    processes = {process for _, process in begun}
    assert len(processes) == 2 and str(os.getpid()) not in processes
    assert content(out) == alone(stage, tmp_path / "one")
    assert [worker["peak_rss_bytes"] > 1e6 for worker in notes["workers"]] == [True, True]
    said = [record for record in caplog.records if record.name == toy_units.__name__]
    assert [record.getMessage() for record in said[:2]] == ["opened for 12"] * 2
    assert {str(record.process) for record in said[:2]} == processes
    assert [path.name for path in (out / JOURNAL).iterdir() if path.is_dir()] == []  # no desk


def test_a_unit_that_ends_its_worker_is_tried_again(run, stage, tmp_path, out, caplog):
    harmed = dataclasses.replace(stage, harm={"part 01": "die once"})
    run(harmed, out, {}, {})
    assert len(stage.begun("part 01")) == 2
    assert "a worker died (" in caplog.text
    assert content(out) == alone(stage, tmp_path / "one")


def test_a_unit_that_always_ends_its_worker_is_named_and_the_others_are_kept(run, stage, out):
    harmed = dataclasses.replace(stage, count=4, harm={"part 03": "die"})
    with pytest.raises(UnsupportedError, match="parts: part 03 ended 3 workers"):
        run(harmed, out, {}, {})
    assert len(stage.begun("part 03")) == 3
    kept = [name for name in harmed.units() if Units(out, harmed).done(name)]
    assert kept == ["part 00", "part 01", "part 02"]


def test_an_error_of_a_unit_is_the_stages_and_is_not_tried_again(run, stage, out):
    harmed = dataclasses.replace(stage, harm={"part 03": "fail"})
    with pytest.raises(NumericalError, match=r"^part 03: not finite$"):
        run(harmed, out, {}, {})
    assert len(stage.begun("part 03")) == 1
