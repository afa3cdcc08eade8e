import json

import pytest

SWEEP = ["compress", "-m", "squares.power=2,3"]
TROUBLE = ["numbers.trouble=numbers", "numbers.count=2,4"]  # at the third number


def check(store):
    assert sorted(artifact.stage for artifact in store.list()) == [
        "numbers", "squares", "squares", "total", "total",
    ]  # fmt: skip
    (sweep,) = (store.root / "runs").iterdir()
    records = [json.loads((sweep / job / "artifacts.json").read_text()) for job in "01"]
    assert records[0]["numbers"] == records[1]["numbers"]
    assert records[0]["total"] != records[1]["total"]


def test_basic_launcher_shares_what_is_upstream(dirotq, store):
    assert dirotq(*SWEEP).status == 0
    check(store)


def test_joblib_launcher(spawn, store):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    process = spawn(*SWEEP, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    check(store)


def test_jobs_of_a_cluster(spawn, store):
    """Submitit's jobs, as Slurm starts them, but on this machine."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    process = spawn(*SWEEP, "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=2")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    check(store)


def test_a_failing_job_under_joblib_is_as_clear(spawn, store):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    process = spawn("compress", "-m", *TROUBLE, "hydra/launcher=joblib")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "dirotq: site blocks.3.ff: activations hold 7" in err
    assert "Traceback" not in err
    assert len(store.list()) == 3  # the other job's work


def test_sweep_over_models(dirotq, store):
    assert dirotq("compress", "-m", "model=small,large", "until=numbers").status == 0
    assert len(store.list()) == 2


def test_a_wrong_value_of_a_sweep_is_refused_before_its_first_job(dirotq, store):
    found = dirotq("compress", "-m", "squares.power=2,3,5", "numbers.count=3,4")
    assert found.status == 2
    assert "squares.power=5: allowed are 2 and 3" in found.err
    assert not store.root.exists()
