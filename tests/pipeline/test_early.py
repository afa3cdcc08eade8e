"""Workers that start before anybody has units for them."""

import logging
import os
import time

import psutil
import pytest
from toy_units import Parts

from dirotq.errors import ConfigError
from dirotq.pipeline import compress, dag, early
from dirotq.pipeline.executor import LocalExecutor
from dirotq.pipeline.worker import Process, Processes, _prepare


@pytest.fixture
def processes(monkeypatch):
    """``processes()``: ids of the processes that were started early and not yet taken."""
    monkeypatch.setattr(Process, "prepare", lambda _: None)  # half a minute, of two busy cores
    return lambda: [one._child.pid for one in early.started()]


def gone(pid):
    end = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_a_run_takes_them_and_they_log_as_it_does(tmp_path, store, processes, caplog):
    (tmp_path / "ledger").mkdir()
    stage, executor = Parts(count=4, ledger=str(tmp_path / "ledger")), LocalExecutor(workers=2)
    with early.block():
        with caplog.at_level(logging.WARNING):
            executor.start_early()
        waiting = processes()
        assert len(waiting) == 2
        with caplog.at_level(logging.INFO):
            dag.run(dag.plan({"parts": stage}, {"parts": {}}), store, executor)
        assert {process for _, process in stage.begun()} == {str(pid) for pid in waiting}
        assert "opened for 4" in caplog.messages
        assert not early.started()
    assert all(map(gone, waiting))


def test_those_of_other_settings_are_not_taken_and_end(monkeypatch, processes):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))  # 6 threads each, or 4
    with early.block():
        early.start(Processes(2))
        waiting = processes()
        with LocalExecutor(workers=3).opened():
            assert processes() == waiting
    assert all(map(gone, waiting))


def test_they_start_before_the_model_is_read_and_end_if_that_fails(monkeypatch, processes):
    waiting = []

    def refused(cfg):
        waiting.extend(processes())
        raise ConfigError("no such model")

    monkeypatch.setattr(compress, "build", refused)
    monkeypatch.setattr(compress, "CONFIG", "toyline.conf")
    with pytest.raises(ConfigError, match="no such model"):
        compress.run(["executor.workers=2"])
    assert len(waiting) == 2 and all(map(gone, waiting))


def test_none_start_where_none_are_asked_for(monkeypatch, processes):
    monkeypatch.setattr(compress, "build", lambda cfg: pytest.fail(str(processes())))
    monkeypatch.setattr(compress, "CONFIG", "toyline.conf")
    with pytest.raises(pytest.fail.Exception, match=r"^\[\]$"):
        compress.run([])


def test_outside_of_a_block_none_start():
    processes = Processes(2)
    early.start(processes)
    assert not any(worker._child for worker in processes.workers)


def test_what_they_import_is_there():
    """An error there would only be seen as time."""
    _prepare(gpu=False)
