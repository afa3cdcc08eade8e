import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest
from omegaconf import OmegaConf

from dirotq.errors import ConfigError
from dirotq.pipeline import compress, dag, machine, preflight, report
from dirotq.pipeline.build import Pipeline
from dirotq.pipeline.executor import LocalExecutor
from dirotq.pipeline.machine import Machine, Needs
from dirotq.pipeline.preflight import Estimate, Preflight

CARD = Machine(name="NVIDIA GeForce RTX 4090", vram=24 << 30, ram=64 << 30)
CFG = OmegaConf.create(
    {"preflight": True, "device": "cpu", "workload": {"_target_": "builtins.dict", "ram": 1e6}}
)


@dataclass(frozen=True)
class Telling:
    """Writes one file, and knows what it takes."""

    version: ClassVar[str] = "1"
    resumable: ClassVar[bool] = True
    number: int

    def run(self, out: Path) -> dict[str, float]:
        (out / "number").write_text(str(self.number))
        return {}

    def needs(self, work, here) -> Needs:
        return Needs(ram=work["ram"], disk=10)


def line(store, number=1, force=()):
    steps = dag.plan({"telling": Telling(number)}, {"telling": {}})
    return Pipeline(steps=steps, store=store, executor=LocalExecutor(), force=frozenset(force))


def run(built):
    found = preflight.examine(built, CFG)
    dag.run(built.steps, built.store, built.executor, estimates=found.records)
    return found


def fits(**needs):
    return Preflight(CARD, {"gptq": Estimate(Needs(**needs))})


def test_the_estimate_stands_beside_what_happened(store):
    run(line(store))
    [artifact] = store.list()
    here = machine.find("cpu").name
    assert artifact.provenance["estimate"] == {"vram": 0, "ram": 1e6, "disk": 10, "machine": here}


def test_only_what_would_run_is_estimated(store):
    run(line(store))
    assert preflight.examine(line(store), CFG) == Preflight()
    assert set(preflight.examine(line(store, force=["telling"]), CFG).estimates) == {"telling"}
    off = OmegaConf.merge(CFG, {"preflight": False})
    assert preflight.examine(line(store, number=2), off) == Preflight()


def test_what_fits_passes(tmp_path):
    preflight.refuse(fits(vram=20e9, ram=9e9, disk=1000), tmp_path)
    preflight.refuse(Preflight(), tmp_path)


@pytest.mark.parametrize(
    ("needs", "says"),
    [
        ({"vram": 30e9}, "gptq needs about 30.0 GB of GPU memory and NVIDIA GeForce RTX 4090 has"),
        ({"vram": 30e9, "lower": "x.batch=1"}, "try x.batch=1, or a larger machine"),
        ({"vram": 30e9, "bound": True}, "gptq needs up to 30.0 GB of GPU memory"),
        ({"ram": 70e9}, "gptq needs about 70.0 GB of RAM and there are 68.7 GB"),
        ({"disk": 1e18}, r"gptq 1000000000.0 GB\) and the disk of the store .*store=FOLDER"),
        ({"vram": 30e9}, "preflight=false"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, needs, says):
    with pytest.raises(ConfigError, match=says):
        preflight.refuse(fits(**needs), tmp_path)


def test_sizes_are_never_zero_gigabytes():
    assert (preflight._gb(99e6), preflight._gb(1e8)) == ("99.0 MB", "0.1 GB")


def test_what_an_interrupted_run_left_is_not_needed_again(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    found = fits(disk=free * 1.5)
    with pytest.raises(ConfigError, match="it writes about"):
        preflight.refuse(found, tmp_path)
    left = dataclasses.replace(found.estimates["gptq"], present=int(free * 1.2))
    preflight.refuse(Preflight(CARD, {"gptq": left}), tmp_path / "not" / "there")


def test_the_bytes_an_interrupted_run_left_are_counted(store):
    built = line(store)
    partial = store.root / "telling" / f"{built.steps[0].fingerprint}.partial" / "data"
    partial.mkdir(parents=True)
    (partial / "half").write_bytes(bytes(1000))
    found = preflight.examine(built, CFG)
    assert found.estimates["telling"].present == 1000


class Assembling(dict):
    """A workload whose model has to be put together first."""

    cache_bytes = 3 * 10**9


def test_what_the_model_takes_in_the_cache_is_counted(store, tmp_path, monkeypatch, capsys):
    work = {"workload": {"_target_": f"{__name__}.Assembling", "ram": 2.0}}
    found = preflight.examine(line(store), OmegaConf.merge(CFG, work))
    assert found.cache == 3 * 10**9
    monkeypatch.setenv("DIROTQ_CACHE", str(tmp_path / "cache"))
    report.plan(line(store), found)
    assert f"3.0 GB more for the model in {tmp_path / 'cache'}" in " ".join(
        capsys.readouterr().out.split()
    )


@dataclass(frozen=True)
class Running(Telling):
    """Runs the model twice."""

    def needs(self, work, here) -> Needs:
        return Needs(forwards={"telling": (2, 3e15)})


class Weighing(dict):
    def told(self, forwards):
        return [f"forwards: {forwards}", "less of it: x=1"]


def test_what_the_workload_says_of_forwards_is_shown(store, capsys, caplog):
    steps = dag.plan({"telling": Running(1)}, {"telling": {}})
    built = Pipeline(steps=steps, store=store, executor=LocalExecutor(), force=frozenset())
    cfg = OmegaConf.merge(CFG, {"workload": {"_target_": f"{__name__}.Weighing"}})
    found = preflight.examine(built, cfg)
    assert found.work == ("forwards: {'telling': (2, 3000000000000000.0)}", "less of it: x=1")
    report.plan(built, found)
    assert capsys.readouterr().out.endswith("\n".join([*found.work, ""]))
    compress._run(built, cfg, store.root / "runs" / "one", [])
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warned == ["less of it: x=1"]


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_cache_that_is_too_full_is_refused(tmp_path, monkeypatch, elsewhere):
    monkeypatch.setenv("DIROTQ_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    free = {str(tmp_path): 100, str(tmp_path / "cache"): 60}

    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(free[str(place)]))
    if elsewhere:
        other = type("Stat", (), {"st_dev": -1})
        stat = Path.stat
        monkeypatch.setattr(
            Path, "stat", lambda p, **o: other if p.name == "cache" else stat(p, **o)
        )
    estimates = fits(disk=90).estimates
    preflight.refuse(Preflight(CARD, estimates, cache=50 if elsewhere else 4), tmp_path)
    says = r"takes about .* in the cache .*DIROTQ_CACHE=FOLDER" if elsewhere else "in the cache"
    with pytest.raises(ConfigError, match=says):
        preflight.refuse(Preflight(CARD, estimates, cache=60), tmp_path)


def test_the_table(store, capsys):
    def shown(built):
        report.plan(built, preflight.examine(built, CFG))
        out = " ".join(capsys.readouterr().out.split())
        return out.partition(" telling ")[2].split(" 1 to run ")

    step = line(store).steps[0]
    row, outlook = shown(line(store))
    assert row == f"to run {step.fingerprint} - ~1.0 MB ~10 bytes"
    assert outlook.startswith(f"on {machine.find('cpu').name}; ~10 bytes to write, ")
    assert outlook.endswith("of disk free; never run here: telling")
    run(line(store))
    row, outlook = shown(line(store, force=["telling"]))
    assert row == f"to run {step.fingerprint} 0.0 ~1.0 MB ~10 bytes"
    assert outlook.endswith("of disk free; about 0 s, going by the last time")


@pytest.mark.parametrize(("seconds", "text"), [(45, "45 s"), (720, "12 min"), (12600, "3.5 h")])
def test_durations(seconds, text):
    assert report.duration_text(seconds) == text
