import importlib
import json

import pytest
import torch

from dirotq import doctor
from dirotq.kernels import chip, measured, plan
from dirotq.kernels.plan import renew
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
    found = dict(doctor.findings())
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
        monkeypatch.setattr(doctor, "_try", lambda spec, rows: None)
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


def test_kernels_that_do_not_compile_are_shown(gpu, monkeypatch):
    from triton.runtime.errors import OutOfResources

    def refuse(spec, rows):
        chosen = plan.choose(90, rows, spec.outputs, spec, torch.bfloat16)
        assert plan.refuse(90, spec, chosen, OutOfResources(2, 1, "shared memory"))

    gpu(90)
    monkeypatch.setattr(doctor, "_try", refuse)
    try:
        fast, said = doctor._kernels()
    finally:
        plan._refused.cache_clear()
        plan.renew()
    assert fast
    assert said.count("did not compile here") == len(doctor.FLUX_LINEARS)
    assert "scaled_mm did not compile here" in said


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
    gpu(90)
    broken = tmp_path / "plans.json"
    broken.write_text("{")
    monkeypatch.setattr(measured, "TABLE", broken)
    renew()
    try:
        fast, said = doctor._kernels()
        assert "JSONDecodeError" in doctor._plans()
    finally:
        renew()
    assert not fast
    assert "JSONDecodeError" in said


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """``tables(shipped, gpu=triton, ...)``: sm_89 with that shipped, and files of those GPUs."""
    monkeypatch.setenv("DIROTQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(chip, "capability", lambda device: 89)
    monkeypatch.setattr(measured, "gpu_of", lambda chip: "mine")
    monkeypatch.setattr(measured, "triton_version", lambda: "3.7.1")
    monkeypatch.setattr(measured, "TABLE", tmp_path / "shipped.json")
    row = {"m": 1, "n": 2, "k": 3, "plan": "scaled_mm", "us": 4.0}

    def install(shipped, **files):
        if shipped:
            measured.TABLE.write_text(json.dumps({"89": {"w4a4": [row]}}))
        for gpu, triton in files.items():
            text = {
                "chip": 89, "gpu": gpu, "driver": "", "triton": triton, "torch": "2.11",
                "date": "2026-11-30", "plans": {"w4a4": [row, row]},
            }  # fmt: skip
            file = measured.tuned_folder() / measured.tuned_name(89, gpu, triton)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(text))
        renew()

    yield install
    monkeypatch.undo()
    renew()


@pytest.mark.parametrize(
    ("shipped", "files", "said"),
    [
        (False, {}, "by rule: no measurement for sm_89; `dirotq tune` measures here"),
        (True, {}, "shipped for sm_89, not measured on this GPU; `dirotq tune` measures here"),
        (False, {"other": "3.7.1"},
         "borrowed: measured on another sm_89, other; `dirotq tune` measures here"),
        (True, {"other": "3.7.1"},
         "shipped for sm_89, not measured on this GPU; `dirotq tune` measures here"),
        (True, {"mine": "3.7.1", "other": "3.7.1"},
         "1 shapes measured on this GPU by `dirotq tune`, 2026-11-30"),
        (True, {"mine": "3.6.0"}, "measured on this GPU with triton 3.6.0, which now is 3.7.1; "
         "`dirotq tune` measures here"),
    ],
)  # fmt: skip
def test_where_the_plans_come_from(tables, shipped, files, said):
    tables(shipped, **files)
    assert doctor._plans() == said


def test_a_cache_that_cannot_be_written_is_a_finding(tables, monkeypatch, tmp_path):
    tables(False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIROTQ_CACHE", str(tmp_path / "file" / "below"))
    renew()
    assert doctor._plans() == (
        "by rule: no measurement for sm_89; `dirotq tune` measures here once DIROTQ_CACHE is a "
        f"folder of yours ({tmp_path / 'file' / 'below' / 'plans'} is not)"
    )


def test_plans_are_a_topic_where_kernels_run(tables, monkeypatch):
    tables(False)
    monkeypatch.setattr(doctor, "_kernels", lambda: (True, "sm_89"))
    assert dict(doctor.findings())["plans"].startswith("by rule")
    monkeypatch.setattr(doctor, "_kernels", lambda: (False, "no GPU"))
    assert "plans" not in dict(doctor.findings())


def test_would_run_follows_the_kernels(gpu, monkeypatch):
    monkeypatch.setattr(doctor, "_kernels", lambda: (True, "sm_90"))
    assert "packed models on the Triton kernels" in dict(doctor.findings())["would run"]
    monkeypatch.setattr(doctor, "_kernels", lambda: (False, "no GPU"))
    assert "packed models on the torch reference path" in dict(doctor.findings())["would run"]
