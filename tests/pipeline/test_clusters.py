"""Executors on clusters, as far as they go without one; tests/clusters has the rest."""

import logging
import os
import shutil
import socket
import threading
import time
from importlib.metadata import PackageNotFoundError

import pytest
from toy_units import Parts

from dirotq.errors import ArtifactError, ConfigError, UnsupportedError
from dirotq.pipeline import cluster, desk, graphics, job, machine
from dirotq.pipeline.desk import Desk
from dirotq.pipeline.graphics import Graphics
from dirotq.pipeline.job import Job, answer, make_units
from dirotq.pipeline.machine import Needs
from dirotq.pipeline.ray_cluster import Actors, RayExecutor
from dirotq.pipeline.slurm_cluster import SlurmExecutor
from dirotq.pipeline.stage import recipe

CARD = Graphics(name="NVIDIA H200", memory=141 << 30, capability="9.0", driver="570")


def ray(**changes):
    return RayExecutor(**{"workers": 2, "cpus": 1, "gpus": 0, "address": None} | changes)


def slurm(**changes):
    given = {"workers": 2, "cpus": 1, "gpus": 0, "minutes": 5, "cluster": "slurm", "options": {}}
    return SlurmExecutor(**given | changes)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "versions", lambda: {"torch": "2.13.0+cu130"})
    monkeypatch.setattr(graphics, "_asked", lambda: (CARD,))


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        (ray, {"workers": 0}, "executor.workers=0: use at least 1"),
        (slurm, {"workers": -1}, "executor.workers=-1"),
        (slurm, {"cpus": 0}, "executor.cpus=0: use at least 1"),
        (ray, {"gpus": 2}, "executor.gpus=2: a worker computes on one GPU"),
        (ray, {"gpus": -1}, "executor.gpus=-1"),
        (slurm, {"minutes": 0}, "executor.minutes=0"),
        (ray, {"address": "somewhere"}, "executor.address=somewhere: use HOST:PORT"),
        (ray, {"address": ":6379"}, "executor.address=:6379: use HOST:PORT"),
        (ray, {"address": "head:port"}, "executor.address=head:port: use HOST:PORT"),
    ],
)
def test_what_can_not_be_is_refused(make, settings, said):
    with pytest.raises(ConfigError, match=said):
        make(**settings)


@pytest.mark.parametrize(("make", "name"), [(ray, "ray"), (slurm, "slurm")])
def test_what_is_not_installed_is_named(monkeypatch, make, name):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(cluster, "version", missing)
    with pytest.raises(ConfigError, match=rf"pip install 'dirotq\[{name}\]'"), make().opened():
        pass


def test_without_slurm_this_machine_is_offered(monkeypatch):
    monkeypatch.setattr(cluster, "version", lambda package: "1")
    monkeypatch.setattr(shutil, "which", lambda program: None)
    said = "no SLURM here .*executor=local executor.workers=2"
    with pytest.raises(ConfigError, match=said), slurm().opened():
        pass
    with slurm(cluster="local").opened():
        pass


def test_a_cluster_of_others_that_is_gone_is_noticed_at_once():
    pytest.importorskip("ray")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UnsupportedError, match=f"{address}: no Ray cluster answers"):
            Actors(ray(address=address)).new()


@pytest.mark.parametrize("make", [ray, slurm])
def test_workers_compute_on_what_the_run_computes_on(gpu, make):
    for device in ("auto", "cuda"):
        make(gpus=1).refuse(device, "device")
        with pytest.raises(ConfigError, match=rf"gptq.device={device} is a GPU here.*gpus=1"):
            make().refuse(device, "gptq.device")
    make().refuse("cpu", "device")
    with pytest.raises(ConfigError, match="both say where to compute"):
        make(gpus=1).refuse("cpu", "device")
    with pytest.raises(ConfigError, match="both say where to compute"):
        make(gpus=1).refuse("cuda:1", "device")


def test_a_worker_without_a_gpu_refuses_a_run_on_gpus(tmp_path, monkeypatch):
    class OnAGpu(Parts):
        device = "cuda"

    stage = OnAGpu(count=1, ledger=str(tmp_path))
    monkeypatch.setattr(graphics, "_asked", lambda: ())
    with pytest.raises(UnsupportedError, match="has no GPU that torch can use"):
        make_units(Job("t", stage, recipe(stage), tmp_path, ("part 00",), {}), ["part 00"])
    assert stage.begun() == []


def test_needs_here():
    parts, one = Parts(count=1, ledger=""), Needs(vram=3.0, ram=5.0, disk=7.0)
    assert slurm().together(parts, one) == one
    assert ray(address="auto").together(parts, one) == one
    assert ray(workers=3).together(parts, one) == Needs(vram=3.0, ram=15.0, disk=7.0)
    assert ray(workers=3).together(object(), one) == one


def test_a_job_makes_its_whole_share_and_an_actor_a_few_units():
    assert [slurm().helping(left, idle) for left, idle in ((5, 2), (4, 2), (1, 2))] == [3, 2, 1]
    assert [ray().helping(left, 2) for left in (100, 12, 1)] == [8, 3, 1]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(desk, "BEAT", 0.02)


@pytest.fixture
def ended(monkeypatch):
    """Set when the process would have ended itself."""
    event = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: event.set())
    return event


def test_what_is_said_at_a_desk_is_logged_and_nothing_stays(tmp_path, quick, caplog):
    log = logging.getLogger("a.worker")
    with caplog.at_level(logging.INFO), Desk(tmp_path / "desk", logging.INFO).open() as opened:
        before = logging.getLogger().handlers
        with opened.seat():
            log.info("one\ntwo %d", 3)
            log.debug("nothing")
            try:
                raise ValueError("trouble")
            except ValueError:
                log.exception("met")
        assert logging.getLogger().handlers is before
        (file,) = (tmp_path / "desk").glob("*.log")
        with file.open("a") as torn:
            torn.write('{"name": "a.worker", "levelno": 20\nhalf a li')
    said = [record.getMessage() for record in caplog.records if record.name == "a.worker"]
    assert said[0] == "one\ntwo 3"
    assert said[1].startswith("met\nTraceback") and said[1].endswith("ValueError: trouble")
    assert len(said) == 2
    assert not (tmp_path / "desk").exists()


def test_a_worker_outlives_no_desk(tmp_path, quick, ended):
    with Desk(tmp_path / "desk", logging.INFO).open() as opened, opened.seat():
        time.sleep(0.2)
        assert not ended.is_set()
        shutil.rmtree(tmp_path / "desk")
        assert ended.wait(5)


def test_a_worker_does_not_outlive_the_runs_process(tmp_path, quick, ended, monkeypatch):
    """The folder stays when that is killed: the number in it stands still."""
    monkeypatch.setattr(desk, "LEASE", 0.3)
    (tmp_path / "desk").mkdir()
    (tmp_path / "desk" / desk.SIGN).write_text("7")
    began = time.monotonic()
    with Desk(tmp_path / "desk", logging.INFO).seat():
        assert ended.wait(5)
    assert time.monotonic() - began > 0.3


def test_nobody_sits_down_at_a_desk_that_is_gone(tmp_path):
    stage = Parts(count=1, ledger=str(tmp_path))
    gone = Desk(tmp_path / "desk", logging.INFO)
    with pytest.raises(FileNotFoundError):
        answer(Job("t", stage, recipe(stage), tmp_path, ("part 00",), {}, gone), ["part 00"])
    assert stage.begun() == []


@pytest.mark.parametrize(("given", "wanted"), [(None, "3"), ("5", "5")])
def test_threads_of_a_worker(monkeypatch, given, wanted):
    for name in job.THREADS:
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert job.threads(3) == dict.fromkeys(job.THREADS, wanted)


def test_what_another_machine_read_is_not_hashed_here(store, monkeypatch):
    """Its disk has another number there, and all else is the same."""
    with store.create("first", {"made": "by a test"}) as draft:
        (draft.data / "read").write_text("right")
    there = store.get("first", draft.artifact.fingerprint)
    there.file("read")
    here = store.get("first", draft.artifact.fingerprint)
    here.saw({name: (*stamp[:-1], stamp[-1] + 7) for name, stamp in there.seen.items()})
    monkeypatch.setattr("dirotq.pipeline.artifact.file_digest", lambda path: pytest.fail("hashed"))
    here.recheck()
    monkeypatch.undo()
    (here.data / "read").write_text("WRONG")
    with pytest.raises(ArtifactError, match="read changed after it was written"):
        here.recheck()
