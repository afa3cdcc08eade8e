from pathlib import Path
from types import SimpleNamespace

import pytest
from toy_units import Parts

from dirotq.errors import ConfigError
from dirotq.pipeline import dag, graphics, machine
from dirotq.pipeline.executor import LocalExecutor
from dirotq.pipeline.graphics import Graphics
from dirotq.pipeline.machine import Needs

CARD = Graphics(name="NVIDIA H200", memory=141 << 30, capability="9.0", driver="570")


@pytest.fixture
def gpus(monkeypatch):
    """``gpus(2)``: a machine with so many."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "versions", lambda: {"torch": "2.13.0+cu130"})
    return lambda count: monkeypatch.setattr(graphics, "_asked", lambda: (CARD,) * count)


def test_without_settings_this_process_does_it_all():
    def stage(out, **inputs):
        return {"out": out, **inputs}

    with LocalExecutor().opened() as run:
        made = run(SimpleNamespace(run=stage), Path("there"), {"first": 1}, {})
    assert made == {"out": Path("there"), "first": 1}
    assert LocalExecutor(workers=1).processes == 0


def test_the_line_with_two_workers_publishes_what_one_does(tmp_path, store):
    (tmp_path / "ledger").mkdir()
    stage = Parts(count=4, ledger=str(tmp_path / "ledger"))
    steps = dag.plan({"parts": stage}, {"parts": {}})
    found = []
    for workers in (None, 2):
        done = dag.run(steps, store, LocalExecutor(workers=workers), force=["parts"])
        artifact = done["parts"].artifact
        found.append((artifact.manifest, artifact.provenance))
    assert len({process for _, process in stage.begun()}) == 3
    (one, alone), (two, shared) = found
    assert one == two
    peaks = [worker["peak_rss_bytes"] for worker in shared["workers"]]
    assert len(peaks) == 2 and min(peaks) > 1e6
    assert "workers" not in alone


def test_needs_are_those_of_all_workers(gpus):
    gpus(2)
    one, parts = Needs(vram=3.0, ram=5.0, disk=7.0), Parts(count=1, ledger="")
    assert LocalExecutor().together(parts, one) == one
    assert LocalExecutor(workers=3).together(object(), one) == one  # not divided
    wanted = {
        LocalExecutor(workers=3): (9.0, 15.0),
        LocalExecutor(devices=(0, 1)): (3.0, 10.0),
        LocalExecutor(devices=(0, 1), workers=4): (6.0, 20.0),
    }
    for executor, (vram, ram) in wanted.items():
        assert executor.together(parts, one) == Needs(vram=vram, ram=ram, disk=7.0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"workers": 0}, "executor.workers=0: use at least 1"),
        ({"workers": -2}, "executor.workers=-2"),
        ({"devices": []}, r"executor.devices=\[\]: use the numbers of GPUs"),
        ({"devices": [-1]}, r"executor.devices=\[-1\]: use the numbers of GPUs"),
        ({"devices": [0, 0]}, r"executor.devices=\[0,0\] names a GPU twice"),
        ({"devices": [7]}, r"executor.devices=\[7\], but nvidia-smi finds 2 GPUs here;"),
        ({"devices": [0, 2]}, r"executor.devices=\[0,2\], but nvidia-smi finds 2 GPUs here"),
        ({"devices": [0, 1], "workers": 3}, "use a multiple of 2"),
    ],
)
def test_what_is_not_there_is_refused(gpus, settings, said):
    gpus(2)
    with pytest.raises(ConfigError, match=said):
        LocalExecutor(**settings)


@pytest.mark.parametrize(
    ("settings", "processes"),
    [
        ({"devices": [0]}, 1),
        ({"devices": [1, 0]}, 2),
        ({"devices": [0], "workers": 2}, 2),
        ({"workers": 3}, 3),
        ({}, 0),
    ],
)
def test_processes(gpus, settings, processes):
    gpus(2)
    assert LocalExecutor(**settings).processes == processes


def test_devices_of_a_machine_without_any(gpus, monkeypatch):
    gpus(0)
    with pytest.raises(ConfigError, match="no usable GPU here; name GPUs that are there"):
        LocalExecutor(devices=[0])
    monkeypatch.setattr(machine, "versions", lambda: {"torch": "2.13.0+cpu"})
    with pytest.raises(ConfigError, match="built without CUDA"):
        LocalExecutor(devices=[0])


def test_hidden_gpus_are_said_to_be(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    LocalExecutor(devices=[0])
    with pytest.raises(ConfigError, match=r"finds 1 GPU here \(CUDA_VISIBLE_DEVICES=1\)"):
        LocalExecutor(devices=[1])


@pytest.mark.parametrize(("device", "fits"), [("auto", 1), ("cuda", 1), ("cuda:1", 0), ("cpu", 0)])
def test_one_place_says_where_to_compute(gpus, device, fits):
    gpus(2)
    LocalExecutor(workers=2).refuse(device, "device")
    executor = LocalExecutor(devices=[0, 1])
    if fits:
        executor.refuse(device, "device")
    else:
        with pytest.raises(ConfigError, match=f"gptq.device={device} and executor.devices"):
            executor.refuse(device, "gptq.device")


def test_settings_of_the_wrong_kind(dirotq):
    status, _, said = dirotq("plan", "executor.devices=0")
    assert status == 2 and "executor.devices=0 does not fit" in said
    status, _, said = dirotq("plan", "executor.workers=two")
    assert status == 2 and "executor.workers='two' does not fit" in said
    status, _, said = dirotq("plan", "executor.workers=0")
    assert status == 2 and "use at least 1" in said
