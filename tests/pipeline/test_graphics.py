from types import SimpleNamespace

import pynvml
import pytest

from dirotq.pipeline import graphics, provenance
from dirotq.pipeline.graphics import Graphics

TWO = (
    Graphics("NVIDIA H200", 150_754_820_096, "9.0", "570.86"),
    Graphics("NVIDIA GeForce RTX 4090", 25_757_220_864, "8.9", "570.86"),
)


@pytest.fixture(autouse=True)
def asked_anew():
    graphics._asked.cache_clear()
    yield
    graphics._asked.cache_clear()


@pytest.fixture
def nvml(monkeypatch):
    """NVIDIA's library as it answers on a machine with two GPUs."""
    of = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(TWO),
        "nvmlSystemGetDriverVersion": lambda: "570.86",
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda index: TWO[index].name,
        "nvmlDeviceGetMemoryInfo": lambda index: SimpleNamespace(total=TWO[index].memory),
        "nvmlDeviceGetCudaComputeCapability": lambda index: ((9, 0), (8, 9))[index],
    }
    for name, answer in of.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_what_the_library_tells(nvml):
    assert graphics.installed() == graphics.visible() == TWO
    assert not graphics.hidden()


def test_provenance_names_every_gpu(nvml):
    assert provenance.provenance(0.0, ())["gpu"] == [
        "NVIDIA H200, 9.0, 570.86",
        "NVIDIA GeForce RTX 4090, 8.9, 570.86",
    ]


@pytest.mark.parametrize(
    ("visible", "found"), [("", ()), ("-1", ()), ("1", TWO[1:]), ("0,1", TWO), ("GPU-5", TWO[:1])]
)
def test_what_cuda_would_see(nvml, monkeypatch, visible, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert graphics.visible() == found


@pytest.mark.parametrize("driver", [True, False])
def test_a_library_that_is_missing(monkeypatch, tmp_path, driver):
    def missing():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    monkeypatch.setattr(graphics, "DRIVER", tmp_path if driver else tmp_path / "none")
    assert graphics.installed() == ()
    assert graphics.hidden() == driver


def test_a_gpu_that_does_not_answer(nvml, monkeypatch):
    def lost(_):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lost)
    assert graphics.installed() == ()
