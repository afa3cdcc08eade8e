"""Runs of a sweep at the same time share what is upstream: one computes it, the others wait."""

import json
import os
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_module

from dirotq.pipeline.config import compose_config
from dirotq.pipeline.store import ArtifactStore

LAUNCHERS = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra.launcher.timeout_min=2"],
    "ray": ["hydra.launcher.ray.init.address=local", "+hydra.launcher.ray.init.num_cpus=2"],
}


def toyline(tmp_path, *words):
    """Run the command line on the toy tree; return what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "toyline", "compress", "-m", *words, f"store={tmp_path / 'store'}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, cwd=tmp_path, text=True,
        capture_output=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_four_runs_on_two_workers_compute_what_they_share_once(launcher, tmp_path):
    shared = ["numbers.count=4", f"numbers.ledger={tmp_path / 'ledger'}", "numbers.pause=0.2"]
    runs = ["squares.power=2,3", "verbose=false,true"]
    toyline(tmp_path, *shared, *runs, f"hydra/launcher={launcher}", *LAUNCHERS[launcher])
    assert sorted((tmp_path / "ledger").read_text().split()) == ["0", "1", "2", "3"]
    store = ArtifactStore(tmp_path / "store")
    made = [artifact.stage for artifact in store.list()]
    assert sorted(made) == ["numbers", "squares", "squares", "total", "total"]
    (sweep,) = (store.root / "runs").iterdir()
    records = [json.loads((sweep / job / "artifacts.json").read_text()) for job in "0123"]
    assert len({record["numbers"] for record in records}) == 1
    assert len({record["total"] for record in records}) == 2


def test_a_search_is_told_the_objectives(tmp_path):
    """A smaller mean is better, and a larger sum: no choice is best at both."""
    words = [
        "hydra/sweeper=optuna", "hydra.sweeper.direction=[minimize,maximize]",
        "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=1",
        "objectives=[per_number,total]", "numbers.count=choice(2,4)", "squares.power=choice(2,3)",
    ]  # fmt: skip
    toyline(tmp_path, *words)
    (sweep,) = (tmp_path / "store" / "runs").iterdir()
    found = (sweep / "optimization_results.yaml").read_text()
    store = ArtifactStore(tmp_path / "store")
    best = {artifact.metrics["total"] for artifact in store.list() if artifact.stage == "total"}
    assert f"- {max(best)}" in found


def test_the_search_has_choices_that_exist():
    cfg = compose_config(["experiment=search"], "dirotq.conf")
    assert cfg.objectives == ["bits_per_parameter", "psnr"]
    with initialize_config_module("dirotq.conf", version_base="1.3"):
        full = compose("config", ["experiment=search"], return_hydra_config=True)
    assert list(full.hydra.sweeper.direction) == ["minimize", "maximize"]
    for name, choices in full.hydra.sweeper.params.items():
        for choice in choices.removeprefix("choice(").removesuffix(")").split(","):
            compose_config(["experiment=search", f"{name}={choice}"], "dirotq.conf")
