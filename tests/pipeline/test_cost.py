import pytest

from dirotq.errors import ConfigError
from dirotq.pipeline.cost import budget
from dirotq.pipeline.machine import cpu, gpu

H200 = gpu("NVIDIA H200", 150_000_000_000, 128_000_000_000)


def test_measured_figures_of_an_h200():
    # FLUX.1-dev, 74 TFLOP a forward: 174 ms; the moments' kernel at two widths, TFLOP/s.
    assert H200.forward_seconds(74.4e12, 3072, 57) == pytest.approx(0.174, rel=0.02)
    for channels, rate in ((15360, 1387e12), (3072, 665e12)):
        flops = 2 * 4608 * channels**2
        assert H200.moment_seconds(4608, channels) == pytest.approx(flops / rate, rel=0.01)


def test_a_small_forward_takes_its_launches():
    assert H200.forward_seconds(1e6, 64, 10) == 10 * H200.block


def test_without_a_gpu_all_memory_is_host_memory():
    on_cpu = cpu(2, 16 << 30)
    assert on_cpu.memory(1e9, 1e9) == {
        "vram": 0.0,
        "ram": on_cpu.base_ram + 2e9 * on_cpu.slack,
    }
    assert H200.memory(1e9, 2e9) == {"vram": H200.slack * 1e9, "ram": H200.base_ram + 2e9}


def test_budget():
    assert budget(H200, None) == 150_000_000_000
    assert budget(H200, "24GB") == 24_000_000_000
    with pytest.raises(ConfigError, match=r"capture.vram=200GB is more than NVIDIA H200 has \(150"):
        budget(H200, "200GB")
