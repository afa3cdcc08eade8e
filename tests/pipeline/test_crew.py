"""Units in several processes: the same bytes, each made once, whoever dies."""

import contextlib
import dataclasses
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import toy_units
from toy_units import Parts, ReadsFirst, Tower, alone, content

from dirotq.errors import ArtifactError, NumericalError, UnsupportedError
from dirotq.pipeline import crew as module
from dirotq.pipeline.crew import Crew
from dirotq.pipeline.divided import Divided, Followed, in_units
from dirotq.pipeline.job import Job, make_units
from dirotq.pipeline.stage import recipe
from dirotq.pipeline.units import JOURNAL, Units
from dirotq.pipeline.worker import Processes, environment


@pytest.fixture
def stage(tmp_path):
    (tmp_path / "ledger").mkdir()
    return Parts(count=12, ledger=str(tmp_path / "ledger"))


@pytest.fixture(scope="module")
def pair():
    with Crew(Processes(2)) as crew:
        yield crew


def shared(stage, out, crew):
    out.mkdir(exist_ok=True)
    return in_units(stage, out, {}, crew.share)


def test_what_is_divided_and_what_is_not(stage):
    assert isinstance(stage, Divided)
    assert not isinstance(object(), Divided)
    assert not isinstance(stage, Followed)


def test_two_workers_make_each_unit_once_with_the_bytes_of_one(stage, tmp_path, pair):
    slow = dataclasses.replace(stage, pause=0.02)
    assert shared(slow, tmp_path / "two", pair) == {"parts": 12}
    begun = stage.begun()
    assert Counter(unit for unit, _ in begun) == Counter(stage.units())
    assert {process for _, process in begun}.isdisjoint({str(os.getpid())})
    assert len({process for _, process in begun}) == 2
    assert content(tmp_path / "two") == alone(stage, tmp_path / "one")


def test_a_unit_that_ends_its_worker_is_tried_again(stage, tmp_path, pair, caplog):
    harmed = dataclasses.replace(stage, harm={"part 01": "die once", "part 11": "die once"})
    shared(harmed, tmp_path / "harmed", pair)
    times = Counter(unit for unit, _ in stage.begun())
    assert times["part 01"] == times["part 11"] == 2
    assert "a worker died" in caplog.text
    assert content(tmp_path / "harmed") == alone(stage, tmp_path / "one")


def test_a_unit_that_always_ends_its_worker_is_named_and_the_others_are_kept(stage, tmp_path, pair):
    harmed = dataclasses.replace(stage, harm={"part 05": "die"})
    message = "parts: part 05 ended 3 workers"
    with pytest.raises(UnsupportedError, match=message), Crew(Processes(2)) as ended:
        shared(harmed, tmp_path / "out", ended)
    assert len(stage.begun("part 05")) == module.TRIES
    kept = [name for name in stage.units() if Units(tmp_path / "out", stage).done(name)]
    assert len(kept) >= 8 and "part 05" not in kept
    before = len(stage.begun())
    shared(stage, tmp_path / "out", pair)
    assert len(stage.begun()) - before == 12 - len(kept)
    assert content(tmp_path / "out") == alone(stage, tmp_path / "one")


def test_an_error_of_a_unit_is_the_stages_and_is_not_tried_again(stage, tmp_path, pair):
    harmed = dataclasses.replace(stage, harm={"part 03": "fail"})
    with pytest.raises(NumericalError, match="part 03: not finite"):
        shared(harmed, tmp_path / "out", pair)
    assert len(stage.begun("part 03")) == 1


def test_what_workers_log_arrives_in_the_one_log(stage, tmp_path, pair, caplog):
    with caplog.at_level(logging.INFO), Crew(Processes(1)) as crew:
        shared(stage, tmp_path / "out", crew)
    (record,) = (r for r in caplog.records if r.name == toy_units.__name__)
    assert record.getMessage() == "opened for 12"
    assert record.process != os.getpid()


def test_nobody_who_finished_everything_starts_a_worker(stage, tmp_path):
    alone(stage, tmp_path / "out")
    with Crew(Processes(2)) as crew:
        assert shared(stage, tmp_path / "out", crew) == {"parts": 12}
        assert not any(worker.started for worker in crew._workplace.workers)
    assert len(stage.begun()) == 12


def test_a_unit_that_another_program_spoils_is_an_error(stage, tmp_path, pair, monkeypatch):
    monkeypatch.setattr(Units, "adopt", lambda units, names: [])
    with pytest.raises(ArtifactError, match=r"part \d\d is not as it was written"):
        shared(stage, tmp_path / "out", pair)


def test_a_worker_refuses_what_was_not_planned(stage, tmp_path):
    job = Job("token", stage, recipe(stage) | {"version": "2"}, tmp_path, ("part 00",), {})
    with pytest.raises(ArtifactError, match="another version of DiRotQ"):
        make_units(job, ["part 00"])
    assert not stage.begun()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_run_and_its_finished_units_are_kept(tmp_path, how, stage):
    words = [sys.executable, toy_units.__file__, str(tmp_path / "out"), "2", "100", "0.1"]
    (tmp_path / "out").mkdir()
    run = subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        # A shell that started the tests in the background made us ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    until(lambda: len(list((tmp_path / "out" / JOURNAL).glob("*.json"))) >= 4)
    workers = [c for c in psutil.Process(run.pid).children() if "resource" not in str(c.cmdline())]
    assert len(workers) == 2
    for process in [run, *workers] if how == signal.SIGINT else [run]:  # as a terminal does
        with contextlib.suppress(psutil.NoSuchProcess):  # the run may have ended it by then
            process.send_signal(how)
    _, said = run.communicate(timeout=10)
    until(lambda: not any(alive(worker) for worker in workers))
    assert said.count("Traceback") == (how == signal.SIGINT)  # this process's own
    units = Units(tmp_path / "out", dataclasses.replace(stage, count=100))
    assert 4 <= sum(units.done(name) for name in dataclasses.replace(stage, count=100).units()) < 90


def alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def tower(stage):
    """Two parts, and four floors that stand on each other."""
    return Tower(count=2, ledger=stage.ledger)


def built(tower, out, crew):
    out.mkdir(exist_ok=True)
    metrics = in_units(tower, out, {}, crew.share, crew.chain)
    assert not (out / module.MEETING).exists()
    return metrics


def test_of_units_that_follow_each_other_each_worker_does_a_part(tower, tmp_path, pair):
    assert built(tower, tmp_path / "two", pair) == {"floors": 4}
    assert content(tmp_path / "two")["floors/floor 3"] == "012345"
    assert content(tmp_path / "two") == alone(tower, tmp_path / "one")
    assert len({process for unit, process in tower.begun() if "floor" in unit}) == 2
    assert len(tower.begun("floor 0")) == 2  # once by each way


def test_when_one_of_a_chain_dies_its_floor_is_begun_anew(tower, tmp_path, pair, caplog):
    harmed = dataclasses.replace(tower, harm={"floor 2": "die once"})
    built(harmed, tmp_path / "out", pair)
    assert "a worker died; floor" in caplog.text
    assert len(tower.begun("floor 2")) == 2
    assert content(tmp_path / "out") == alone(tower, tmp_path / "one")


@pytest.mark.parametrize(
    ("harm", "error", "message", "times"),
    [
        ("die", UnsupportedError, "floors: floor 0 ended 3 workers", module.TRIES),
        ("fail", NumericalError, "floor 0: not finite", 1),
    ],
)
def test_a_floor_that_cannot_be_built_ends_all_builders(
    tower, tmp_path, pair, harm, error, message, times
):
    harmed = dataclasses.replace(tower, harm={"floor 0": harm})
    with Crew(Processes(2)) as ended:
        with pytest.raises(error, match=message):
            built(harmed, tmp_path / "out", ended)
        assert not any(worker.started for worker in ended._workplace.workers)
    assert len(tower.begun("floor 0")) == times
    built(tower, tmp_path / "out", pair)
    assert content(tmp_path / "out") == alone(tower, tmp_path / "one")


def test_what_workers_cannot_share_this_process_does(tower, tmp_path, pair, caplog):
    refused = dataclasses.replace(tower, unshared=True)
    assert built(refused, tmp_path / "out", pair) == {"floors": 4}
    assert "floors: one process does it alone: no two builders agree" in caplog.text
    assert {process for _, process in tower.begun("floor 0")} == {str(os.getpid())}
    assert content(tmp_path / "out") == alone(tower, tmp_path / "one")


def test_a_script_without_a_guard_is_told(tmp_path):
    script = tmp_path / "script.py"
    (tmp_path / "ledger").mkdir()
    script.write_text(
        f"""
from pathlib import Path
from toy_units import Crew, Parts, Processes, in_units
out = Path({str(tmp_path / "out")!r})
out.mkdir(exist_ok=True)
with Crew(Processes(1)) as crew:
    in_units(Parts(count=2, ledger={str(tmp_path / "ledger")!r}), out, {{}}, crew.share)
"""
    )
    path = os.pathsep.join(sys.path)
    run = subprocess.run(
        [sys.executable, script], env=os.environ | {"PYTHONPATH": path}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode
    assert 'if __name__ == "__main__":' in run.stderr.splitlines()[-1]


@pytest.mark.parametrize(("count", "threads"), [(1, "8"), (2, "4"), (3, "2"), (9, "1")])
def test_cores_are_divided(monkeypatch, count, threads):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    wanted = dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS"], threads)
    assert environment(count, None) == wanted


def test_threads_that_were_asked_for_are_each_ones(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert environment(2, None) == {}


@pytest.mark.parametrize(("visible", "seen"), [(None, "1"), ("5,3", "3"), ("GPU-a,GPU-b", "GPU-b")])
def test_a_worker_sees_one_gpu(monkeypatch, visible, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert environment(2, 1)["CUDA_VISIBLE_DEVICES"] == seen


def test_on_a_gpu_a_stage_computes_on_the_one_that_its_worker_sees(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class OnADevice:
        device: str

    units = Units(tmp_path)
    crew = Crew(Processes(2, [4, 5]))
    assert crew._job(OnADevice("auto"), units, [], {}, None).stage.device == "cuda"
    assert Crew(Processes(2))._job(OnADevice("auto"), units, [], {}, None).stage.device == "auto"


def test_a_folder_is_left_alone_by_who_joins(stage, tmp_path):
    alone(stage, tmp_path / "out")
    (tmp_path / "out" / "half").write_text("of another worker")
    units = Units.joined(tmp_path / "out", stage, recipe(stage))
    assert (tmp_path / "out" / "half").exists()
    part = tmp_path / "out" / "parts" / "part 00"
    part.write_text("made anew")
    units.finish("part 00", [part])
    units.flush()
    assert Units(tmp_path / "out", stage).done("part 00")
    assert Path(tmp_path / "out" / "half").exists() is False


def test_what_workers_read_is_looked_at_once_more(store, stage, tmp_path, pair):
    (tmp_path / "input").mkdir()
    with store.create("first", {"made": "by a test"}) as draft:
        (draft.data / "read").write_text("right")
        (draft.data / "ignored").write_text("right")
    first = draft.artifact
    reading = ReadsFirst(**{f.name: getattr(stage, f.name) for f in dataclasses.fields(stage)})
    (tmp_path / "out").mkdir()
    in_units(reading, tmp_path / "out", {"first": first}, pair.share)
    assert set(first.seen) == {"read"}
    first.recheck()
    (first.data / "read").write_text("WRONG")
    with pytest.raises(ArtifactError, match="read changed after it was written"):
        first.recheck()
