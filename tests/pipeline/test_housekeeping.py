import shutil

import pytest


@pytest.fixture
def damaged(dirotq, store):
    dirotq("compress")
    artifact = next(artifact for artifact in store.list() if artifact.stage == "squares")
    path = artifact.data / "squares.json"
    path.write_text(path.read_text().replace("9", "8"))
    return artifact


def test_verify_finds_a_changed_byte(dirotq, damaged):
    result = dirotq("verify")
    assert result.status == 2
    assert f"DAMAGED  artifact {damaged} is damaged: squares.json changed" in result.out
    assert "2 of 3 artifacts are intact" in result.out
    assert dirotq("verify", "numbers/").status == 0


def test_a_reader_finds_it_too(dirotq, damaged):
    result = dirotq("compress", "force=total")
    assert result.status == 2
    assert f"artifact {damaged} is damaged" in result.err


def test_remove_then_compress_mends(dirotq, damaged):
    assert "removed" in dirotq("verify", "--remove", str(damaged)).out
    assert dirotq("verify").status == 0
    dirotq("compress")
    assert dirotq("verify").out.count("ok ") == 3


def test_gc_keeps_what_recent_runs_refer_to(dirotq, store):
    dirotq("compress")
    dirotq("compress", "squares.power=3")
    assert "nothing to remove" in dirotq("gc").out
    listed = dirotq("gc", "--keep", "1")
    assert "would remove" in listed.out
    assert listed.out.count("none of the last 1 runs") == 2  # the first run's squares and total
    assert len(store.list()) == 5  # listing removes nothing
    assert "removed" in dirotq("gc", "--keep=1", "--yes").out
    assert len(store.list()) == 3
    assert "everything is cached" in dirotq("plan", "squares.power=3").out


def test_gc_removes_what_dead_runs_left(dirotq, store):
    dirotq("compress", "numbers.trouble=interrupt")
    assert "left by an interrupted run" in dirotq("gc").out
    dirotq("gc", "--yes", f"store={store.root}")
    assert not list(store.root.glob("*/*.partial"))
    assert "nothing to remove" in dirotq("gc").out


def test_a_run_that_failed_early_does_not_push_others_out(dirotq, store):
    dirotq("compress")
    dirotq("compress", "squares.power=5")  # leaves a run folder without a record
    assert "nothing to remove" in dirotq("gc", "--keep=1").out


def test_a_run_folder_elsewhere_is_recorded_all_the_same(dirotq, tmp_path):
    dirotq("compress", f"hydra.run.dir={tmp_path / 'elsewhere'}")
    assert (tmp_path / "elsewhere" / "artifacts.json").exists()
    assert "nothing to remove" in dirotq("gc").out


def test_empty_store(dirotq, store):
    shutil.rmtree(store.root, ignore_errors=True)
    assert "there is no store" in dirotq("verify").err
    assert "nothing to remove; there is no store" in dirotq("gc").out
    store.root.mkdir(parents=True)
    assert "0 of 0" in dirotq("verify").out
    assert dirotq("gc").out == "nothing to remove\n"
