"""A part of what `make torture` does to several machines, with a stage that imports no torch."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import psutil
import pytest
from torture.machines import Nodes
from toy_units import Parts

from dirotq.pipeline import crew
from dirotq.pipeline.divided import in_units
from dirotq.pipeline.store import ArtifactStore
from dirotq.pipeline.units import JOURNAL

HEAD = """
import sys
from toy_units import Parts
from dirotq.pipeline.dag import plan, run
from dirotq.pipeline.executor import LocalExecutor
from dirotq.pipeline.store import ArtifactStore
store, ledger = sys.argv[1:]
stage = Parts(count=24, ledger=ledger, pause=0.03)
run(plan({"parts": stage}, {"parts": {}}), ArtifactStore(store), LocalExecutor(workers=2))
"""


@pytest.fixture
def stage(tmp_path):
    (tmp_path / "ledger").mkdir()
    return Parts(count=24, ledger=str(tmp_path / "ledger"), pause=0.03)


def content(out):
    return {
        path.relative_to(out).as_posix(): path.read_text()
        for path in out.rglob("*")
        if path.is_file() and JOURNAL not in path.parts
    }


def alone(stage, out):
    out.mkdir()
    in_units(dataclasses.replace(stage, pause=0.0), out, {})
    return content(out)


def test_of_two_heads_one_is_killed_and_the_other_goes_on(stage, store_root, tmp_path):
    heads = [_head(store_root, stage.ledger)]
    _until(lambda: len(_entries(store_root)) >= 4)
    heads.append(_head(store_root, stage.ledger))
    kept = _entries(store_root)
    heads[0].kill()
    heads[0].wait()
    _, said = heads[1].communicate(timeout=60)
    assert heads[1].returncode == 0, said
    (made,) = ArtifactStore(store_root).list()
    times = Counter(unit for unit, _ in stage.begun())
    assert {times[name] for name in stage.units()} <= {1, 2}
    assert len([name for name in times if times[name] == 1]) >= len(kept)  # nothing lost
    assert content(made.data) == alone(stage, tmp_path / "one")
    assert [path.name for path in (store_root / "parts").iterdir()] == [made.fingerprint]


def test_a_node_that_was_taken_for_dead_comes_back_and_harms_nothing(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(crew, "LEAVE", 0.1)
    out = tmp_path / "drafts" / "x.partial" / "data"
    out.mkdir(parents=True)
    nodes = Nodes(tmp_path / "drafts", files=6, away=0.2)
    with nodes.opened() as run:
        assert run(stage, out, {}, {}) == {"parts": 24}
    assert nodes.lost
    assert content(out) == alone(stage, tmp_path / "one")
    _until(partial(_ended, nodes.lost))


def _head(store, ledger):
    return subprocess.Popen(
        [sys.executable, "-c", HEAD, str(store), ledger], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def _entries(store):
    return {path.name for path in Path(store).glob(f"parts/*.partial/data/{JOURNAL}/*.json")}


def _ended(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def _until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, threading.enumerate()
        time.sleep(0.02)
