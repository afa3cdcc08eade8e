"""Units made on Ray and by SLURM's jobs: the bytes of one process, whoever dies."""

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
import torch
import toy_units
from tiny_line import stage as stage_of
from tiny_line import tree_bytes
from toy_units import Parts, alone, content

from dirotq.errors import NumericalError, UnsupportedError
from dirotq.pipeline.divided import in_units
from dirotq.pipeline.units import JOURNAL, Units

SCRIPT = """
import sys
from pathlib import Path
from conftest import ray, slurm
from toy_units import Parts

if __name__ == "__main__":
    how, out = sys.argv[1:]
    stage = Parts(count=200, ledger=str(Path(out).parent / "ledger"), pause=0.1)
    with {"ray": ray, "slurm": slurm}[how]().opened() as run:
        run(stage, Path(out), {}, {})
"""


@pytest.fixture
def stage(tmp_path):
    (tmp_path / "ledger").mkdir()
    return Parts(count=12, ledger=str(tmp_path / "ledger"))


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


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


@pytest.mark.parametrize("how", ["ray", "slurm"])
def test_ctrl_c_ends_what_was_started_and_keeps_finished_units(how, stage, tmp_path, out):
    (tmp_path / "script.py").write_text(SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", how, out], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": path},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    end = time.monotonic() + 60
    while len(list((out / JOURNAL).glob("*.json"))) < 4:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.05)
    makers = {int(maker) for _, maker in stage.begun()}
    assert len(makers) == 2
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert said.rstrip().endswith("KeyboardInterrupt"), said
    alive = [pid for pid in makers if psutil.pid_exists(pid)]
    assert not [p for p in alive if psutil.Process(p).status() != psutil.STATUS_ZOMBIE]
    many = dataclasses.replace(stage, count=200)
    assert 4 <= sum(Units(out, many).done(name) for name in many.units()) < 190


def test_a_stage_of_a_real_line_has_the_bytes_of_one_process(run, line, finished, tmp_path):
    """gptq of the tiny pipeline: it reads three artifacts, a model and prompts."""
    inputs = {slot: finished[slot] for slot in ("capture", "basis", "rank")}
    found = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        if name == "here":
            metrics = in_units(stage_of(line(), "gptq"), tmp_path / name, inputs)
        else:
            metrics = run(stage_of(line(), "gptq"), tmp_path / name, inputs, {})
        made = tree_bytes(tmp_path / name)
        found[name] = metrics, {n: b for n, b in made.items() if not n.startswith(JOURNAL)}
    torch.set_num_threads(threads)
    assert found["here"] == found["there"]
    assert set(found["here"][1]) == set(tree_bytes(finished["gptq"].data))
