import importlib

import pytest
import torch

from dirotq import doctor
from dirotq.kernels import chip
from dirotq.pipeline import provenance


def test_says_what_there_is(dirotq, store_root):
    result = dirotq("doctor")
    assert result.status == 0
    for topic in (
        "python",
        "torch",
        "triton",
        "diffusers",
        "gpu",
        "kernels",
        "store",
        "hub",
        "would run",
    ):
        assert f"\n{topic} " in f"\n{result.out}"
    assert str(store_root) in result.out
    assert "offline" in result.out


def test_broken_installs_are_findings_not_failures(monkeypatch):
    def broken(name):
        raise OSError(f"{name}: undefined symbol")

    monkeypatch.setattr(doctor, "import_module", broken)
    monkeypatch.setattr(doctor, "versions", lambda: dict.fromkeys(provenance.LIBRARIES))
    found = doctor.findings()
    assert "missing" in found["torch"]
    assert "undefined symbol" in found["diffusers"]
    assert importlib.import_module("json")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a compute capability, as far as the choice of kernels goes: ``gpu(90)``."""

    def there_is(capability, triton=True):
        chip.why_reference.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(chip, "capability", lambda device: capability)
        if not triton:
            monkeypatch.setattr(chip, "find_spec", lambda name: None)

    yield there_is
    chip.why_reference.cache_clear()


def test_the_plans_that_would_run(gpu):
    gpu(90)
    fast, said = doctor._kernels()
    assert fast
    assert said.startswith("sm_90; FLUX qkv 4608 x 3072 -> 9216: scaled_mm on FP8 codes")
    assert "FLUX modulator 1 x 3072 -> 18432: w4a16" in said


def test_another_chip_has_other_plans(gpu):
    gpu(80)
    fast, said = doctor._kernels()
    assert fast
    assert "INT8" in said
    assert "FP8" not in said


@pytest.mark.parametrize(
    ("capability", "triton", "why"),
    [
        (None, True, "need an NVIDIA GPU"),
        (75, True, "compute capability 7.5; the kernels need 8.0"),
        (90, False, "triton is not installed"),
    ],
)
def test_why_the_kernels_do_not_run(gpu, capability, triton, why):
    gpu(capability, triton)
    fast, said = doctor._kernels()
    assert not fast
    assert "reference path" in said
    assert why in said


def test_a_broken_table_of_plans_is_a_finding(gpu, monkeypatch, tmp_path):
    from dirotq.kernels import plan

    gpu(90)
    broken = tmp_path / "plans.json"
    broken.write_text("{")
    monkeypatch.setattr(plan, "TABLE", broken)
    plan._table.cache_clear()
    plan.choose.cache_clear()
    try:
        fast, said = doctor._kernels()
    finally:
        plan._table.cache_clear()
        plan.choose.cache_clear()
    assert not fast
    assert "JSONDecodeError" in said


def test_would_run_follows_the_kernels(gpu, monkeypatch):
    monkeypatch.setattr(doctor, "_kernels", lambda: (True, "sm_90"))
    assert "packed models on the Triton kernels" in doctor.findings()["would run"]
    monkeypatch.setattr(doctor, "_kernels", lambda: (False, "no GPU"))
    assert "packed models on the torch reference path" in doctor.findings()["would run"]
