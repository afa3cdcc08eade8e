from pathlib import Path
from types import SimpleNamespace

import pytest

from dirotq.errors import ConfigError
from dirotq.pipeline import graphics, machine
from dirotq.pipeline.graphics import Graphics

H200 = Graphics("NVIDIA H200", 150_754_820_096, "9.0", "570.86")
RTX = Graphics("NVIDIA GeForce RTX 4090", 25_757_220_864, "8.9", "570.86")


@pytest.fixture
def gpus(monkeypatch):
    """Set what CUDA would see, beside a torch that can use it."""

    def see(*found):
        monkeypatch.setattr(graphics, "visible", lambda: found)
        monkeypatch.setattr(graphics, "hidden", lambda: False)
        monkeypatch.setattr(machine, "versions", lambda: {"torch": "2.11.0+cu130"})

    see(H200, RTX)
    return see


def test_the_device_that_a_run_would_use(gpus):
    assert machine.find("auto").name == "NVIDIA H200"
    assert machine.find("cuda:1").name == "NVIDIA GeForce RTX 4090"
    assert machine.find("cuda:1").vram == RTX.memory
    assert machine.find("cuda:1").gpu
    assert not machine.find("cpu").gpu


def test_a_torch_without_cuda_runs_on_the_cpu(gpus, monkeypatch):
    monkeypatch.setattr(machine, "versions", lambda: {"torch": "2.13.0+cpu"})
    assert not machine.find("auto").gpu


@pytest.mark.parametrize(("limit", "ram"), [("max", 1000), ("999", 999), ("1001", 1000)])
def test_a_container_has_what_its_limit_leaves(monkeypatch, limit, ram):
    monkeypatch.setattr(
        machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000, total=5000)
    )
    monkeypatch.setattr(Path, "is_file", lambda path: path.name == "memory.max")
    monkeypatch.setattr(Path, "read_text", lambda path: f"{limit}\n")
    assert machine.find("cpu").ram == ram


@pytest.mark.parametrize(
    ("device", "there", "says"),
    [
        ("cuda", [], "nvidia-smi finds no usable GPU"),
        ("cuda:1", [H200], "nvidia-smi finds 1 GPU here"),
        ("cuda:x", [H200], "cuda:x is unknown"),
        ("gpu", [H200], "gpu is unknown; use auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_device_that_is_not_there(gpus, device, there, says):
    gpus(*there)
    with pytest.raises(ConfigError, match=says):
        machine.refuse_device(device, "device")


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:1"])
def test_a_device_that_is(gpus, device):
    machine.refuse_device(device, "device")


def test_a_build_without_cuda(gpus, monkeypatch):
    monkeypatch.setattr(machine, "versions", lambda: {"torch": "2.11.0+cpu"})
    with pytest.raises(ConfigError, match=r"built without CUDA; use gptq\.device=cpu"):
        machine.refuse_device("cuda", "gptq.device")


def test_a_container_without_the_library_leaves_it_to_torch(gpus, monkeypatch):
    gpus()
    monkeypatch.setattr(graphics, "hidden", lambda: True)
    machine.refuse_device("cuda", "device")
