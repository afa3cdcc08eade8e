import json

import pytest

SWEEP = ["compress", "-m", "squares.power=2,3"]


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


def test_a_failing_job_under_joblib_is_as_clear(spawn, store):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    process = spawn("compress", "-m", "squares.power=2,5", "hydra/launcher=joblib")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "dirotq: squares.power=5: allowed are 2 and 3" in err
    assert "Traceback" not in err
    assert len(store.list()) == 3  # the other job's work


def test_sweep_over_models(dirotq, store):
    assert dirotq("compress", "-m", "model=small,large", "until=numbers").status == 0
    assert len(store.list()) == 2
