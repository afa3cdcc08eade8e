"""All stages together, from the real config tree, on the tiny pipeline."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_line import METHODS, configured, overrides, run, tree_bytes

import dirotq
from dirotq.quantize.plan import read_plan

STAGES = ["capture", "basis", "rank", "gptq", "fuse", "pack", "reference", "validate"]
ROOT = Path(__file__).resolve().parents[2]


# Both formats of FP4 and both transforms; the other two pairs: tests/stages/test_rank.py.
@pytest.mark.parametrize("name", [m for m in METHODS if m not in ("dirotq_mxfp4", "rtn_nvfp4")])
def test_every_method_runs_through(line, name):
    artifacts = run(line(f"method={name}"))
    assert list(artifacts) == STAGES
    metrics = artifacts["validate"].metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["psnr"] > 30
    assert metrics["sqnr_db"] > 10
    assert artifacts["fuse"].metrics["network_error"] < 1e-5
    for artifact in artifacts.values():
        artifact.check()


@pytest.mark.parametrize("change", ["rank.r=0", "rank.r=64", "method.modulator_group=null"])
def test_the_extremes_run_through(line, change):
    metrics = run(line(change))["validate"].metrics
    assert metrics["psnr"] > 30
    assert math.isfinite(metrics["sqnr_db"])


def test_groups_of_128(line):
    """Sites of 256 channels take them, narrower ones a half; finer scales are closer."""
    groups = ("weight_format.group=128", "act_format.group=128")
    artifacts = run(line("method=groups", *groups))
    plan = read_plan(artifacts["rank"].file("plan.json"))
    taken = {e.site.in_features: e.spec.activations.group for e in plan if e.site.kind == "block"}
    assert taken == {64: 64, 256: 128, 320: 64}
    assert all(
        e.spec.weights.group == taken[e.site.in_features] for e in plan if e.site.kind == "block"
    )
    metrics = artifacts["validate"].metrics
    assert metrics["psnr"] > 30
    assert metrics["sqnr_db"] > 10


def test_fp4_scales_count_in_the_bits(line):
    bits = {
        name: run(line(f"method=rtn_{name}", "until=pack"))["pack"].metrics["bits_per_parameter"]
        for name in ("nvfp4", "mxfp4")
    }
    assert bits["nvfp4"] > bits["mxfp4"]


def test_more_bits_and_more_rank_mean_less_error(line):
    sqnr = {
        change: run(line(change))["validate"].metrics["sqnr_db"]
        for change in ("rank.r=0", "rank.r=16", "rank.r=64", "method=dirotq_w4a8")
    }
    assert sqnr["rank.r=0"] < sqnr["rank.r=16"] < sqnr["rank.r=64"]
    assert sqnr["method=dirotq_w4a8"] > sqnr["rank.r=16"] + 3


@pytest.mark.parametrize(
    ("change", "rerun"),
    [
        ("rank.r=8", [name for name in STAGES[2:] if name != "reference"]),
        ("gptq.damping=0.02", ["gptq", "pack", "validate"]),
        ("validate.pairs=1", ["validate"]),
        ("fuse.layer_tolerance=2e-5", ["fuse", "pack", "validate"]),
        ("capture.calls=18", [name for name in STAGES if name != "reference"]),
        ("reference.batch=1", ["reference", "validate"]),
        ("dtype=float32", ["reference", "validate"]),
        ("device=auto", []),
    ],
)
def test_a_change_reruns_only_what_follows_from_it(finished, line, change, rerun):
    steps = line(change).steps
    changed = [step.name for step in steps if step.fingerprint != finished[step.name].fingerprint]
    assert changed == rerun


def test_another_store_gets_the_same_bytes(tiny_root, tmp_path, line):
    """Of the dense rotation; of Hadamard's, test_kill_dash_nine_then_the_same_command says so."""
    here = run(line("method=dirotq_dense"))
    there = run(configured(tiny_root, tmp_path / "other", "method=dirotq_dense", "until=pack"))
    for stage in STAGES[:-2]:
        assert here[stage].fingerprint == there[stage].fingerprint
        assert tree_bytes(here[stage].data) == tree_bytes(there[stage].data), stage


def test_compress_from_python(tiny_root, tmp_path):
    made = dirotq.compress(*overrides(tiny_root, tmp_path / "store"), until="rank")
    assert list(made.artifacts) == STAGES[:3]
    assert (made.artifacts["rank"].data / "plan.json").is_file()
    assert made.folder is None and made.report is None and not made.scores


KILLS = (
    ("capture", "dirotq.stages.capture", "save_calls", 1),  # between shards
    ("capture", "dirotq.quantize.replayed_moments", "write_rows", 5),  # between blocks
    ("gptq", "dirotq.stages.gptq", "save_site", 5),
)
"""Stage, and after how many calls of which function it is killed."""
KILL = """
import gc, importlib, json, os, signal, sys
gc.disable()  # as in conftest.py, and the process ends soon
os.fsync = lambda handle: None  # as in conftest.py
from tiny_line import run
from dirotq.pipeline.build import build
from dirotq.pipeline.config import compose_config

module, name, count, command = json.loads(sys.argv[1])
owner = importlib.import_module(module)
right = getattr(owner, name)

def kill_at(*args, **kwargs):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return right(*args, **kwargs)

setattr(owner, name, kill_at)
run(build(compose_config(command, "dirotq.conf")))
"""


def test_kill_dash_nine_then_the_same_command(tiny_root, finished, tmp_path):
    """Each command goes on where the one before died.

    Processes of their own: forks of one would share its OpenMP threads, and wait for them for ever.
    """
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"
    left = {}
    for stage, *kill in KILLS:
        command = json.dumps([*kill, overrides(tiny_root, tmp_path, "until=pack")])
        done = subprocess.run(
            [sys.executable, "-c", KILL, command],
            env=dict(os.environ, PYTHONPATH=path), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr
        (left[stage],) = (tmp_path / stage).iterdir()
        assert left[stage].suffix == ".partial", kill
        assert any((left[stage] / "data").rglob("*.safetensors")), kill
    artifacts = run(configured(tiny_root, tmp_path, "until=pack"))
    for stage, folder in left.items():
        assert artifacts[stage].path.stem == folder.stem
        assert not folder.exists()
    for name, artifact in artifacts.items():
        assert tree_bytes(artifact.data) == tree_bytes(finished[name].data), name
