import subprocess

import pytest

from dirotq.errors import ConfigError
from dirotq.pipeline import machine

TWO = "NVIDIA H200, 143771\nNVIDIA GeForce RTX 4090, 24564\n"


@pytest.fixture
def smi(monkeypatch):
    """nvidia-smi as it answers on a machine with two GPUs, and a torch that can use them."""

    def run(command, **_):
        assert command[0] == "nvidia-smi"
        return subprocess.CompletedProcess(command, 0, stdout=TWO)

    monkeypatch.setattr(machine.subprocess, "run", run)
    monkeypatch.setattr(machine, "versions", lambda: {"torch": "2.11.0+cu130"})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_device_that_a_run_would_use(smi):
    assert machine.find("auto").name == "NVIDIA H200"
    assert machine.find("cuda:1").name == "NVIDIA GeForce RTX 4090"
    assert machine.find("cuda:1").vram == 24564 << 20
    assert not machine.find("cpu").gpu


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("-1", 0), ("1", 1), ("0,1", 2)])
def test_what_cuda_would_see(smi, monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(machine.graphics()) == count


def test_a_torch_without_cuda_runs_on_the_cpu(smi, monkeypatch):
    monkeypatch.setattr(machine, "versions", lambda: {"torch": "2.13.0+cpu"})
    assert not machine.find("auto").gpu


def test_no_driver(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(machine.subprocess, "run", missing)
    assert machine.graphics() == []


def test_rates_follow_the_published_peaks():
    h200, small = machine.gpu("NVIDIA H200", 1, 1), machine.gpu("NVIDIA GeForce RTX 4090", 1, 1)
    assert small.network / h200.network == pytest.approx(165 / 989)
    assert small.float32 > h200.float32 > small.float64
    assert machine.gpu("NVIDIA L40S", 1, 1).network > machine.gpu("NVIDIA L40", 1, 1).network


def test_an_unknown_chip_is_named_as_such():
    assert "not in the table of chips" in machine.gpu("NVIDIA X1", 1, 1).name


def test_cores():
    assert machine.cpu(4, 1).float64 == 4 * machine.cpu(1, 1).float64
    assert machine.cpu(4, 1).write == machine.cpu(1, 1).write


@pytest.mark.parametrize(
    ("device", "gpus", "says"),
    [
        ("cuda", [], "nvidia-smi finds no usable GPU"),
        ("cuda:1", ["H200"], "nvidia-smi finds 1 GPU here"),
        ("cuda:x", ["H200"], "cuda:x is unknown"),
        ("gpu", ["H200"], "gpu is unknown; use auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_device_that_is_not_there(monkeypatch, device, gpus, says):
    monkeypatch.setattr(machine, "versions", lambda: {"torch": "2.11.0"})
    monkeypatch.setattr(machine, "graphics", lambda: [(name, 1) for name in gpus])
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    with pytest.raises(ConfigError, match=says):
        machine.refuse_device(device, "device")


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:1"])
def test_a_device_that_is(monkeypatch, device):
    monkeypatch.setattr(machine, "versions", lambda: {"torch": "2.11.0"})
    monkeypatch.setattr(machine, "graphics", lambda: [("H200", 1), ("H200", 1)])
    machine.refuse_device(device, "device")


def test_a_build_without_cuda_and_a_container_without_tools(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "versions", lambda: {"torch": "2.11.0+cpu"})
    with pytest.raises(ConfigError, match=r"built without CUDA; use gptq\.device=cpu"):
        machine.refuse_device("cuda", "gptq.device")
    monkeypatch.setattr(machine, "versions", lambda: {"torch": "2.11.0"})
    monkeypatch.setattr(machine, "graphics", list)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(machine, "DRIVER", tmp_path)
    machine.refuse_device("cuda", "device")  # torch will tell
