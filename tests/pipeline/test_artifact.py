import os
import shutil
from pathlib import Path

import pytest
from toy_artifact import publish

from dirotq.pipeline.locks import InUseError
from dirotq.pipeline.manifest import DamagedError


def move_away(path: Path) -> Path:
    """Put a folder on another disk, so to say, and a link in its place."""
    target = path.parents[2] / f"other-{path.name}"
    path.rename(target)
    path.symlink_to(target)
    return target


def test_an_artifact_on_another_disk(store, caplog):
    artifact = publish(store)
    target = move_away(artifact.path)
    store.verify(artifact)
    assert artifact.file("one.txt").read_text() == "one"
    store.remove(artifact.path)
    assert f"is a link to {target}" in caplog.text
    assert store.list() == []
    assert (target / "manifest.json").exists()


def test_force_replaces_a_link(store):
    target = move_away(publish(store).path)
    artifact = publish(store, force=True)
    assert not artifact.path.is_symlink()
    assert (target / "manifest.json").exists()


def test_a_stage_on_another_disk(store):
    artifact = publish(store)
    move_away(artifact.path.parent)
    store.verify(artifact)
    publish(store, force=True)
    store.remove(artifact.path)
    assert store.list() == []


def test_a_link_in_data_is_a_stranger(store, tmp_path):
    artifact = publish(store)
    (artifact.data / "tree" / "more").symlink_to(tmp_path)
    with pytest.raises(DamagedError, match="tree/more was not written by the stage"):
        artifact.tree("tree")
    assert artifact.file("one.txt")
    (artifact.data / "one.txt").rename(tmp_path / "one.txt")
    (artifact.data / "one.txt").symlink_to(tmp_path / "one.txt")
    with pytest.raises(DamagedError, match=r"one\.txt is a symbolic link, not a file"):
        artifact.file("one.txt")


def test_a_pipe_in_data_hangs_nobody(store):
    artifact = publish(store)
    (artifact.data / "one.txt").unlink()
    os.mkfifo(artifact.data / "one.txt")
    with pytest.raises(DamagedError, match=r"one\.txt is a named pipe, not a file"):
        store.verify(artifact)


def test_recheck_sees_what_changed_since_it_was_read(store):
    artifact = publish(store)
    artifact.tree("tree")
    (artifact.data / "one.txt").unlink()  # which nobody read
    artifact.recheck()
    path = artifact.data / "tree" / "deep" / "two.txt"
    path.rename(path.with_suffix(".bak"))
    with pytest.raises(DamagedError, match=r"two\.txt is missing"):
        artifact.recheck()
    path.write_text("two")  # another file of the same content
    artifact.recheck()


def test_nobody_takes_an_artifact_from_its_reader(store):
    artifact = publish(store)
    with artifact.held() as there:
        assert there
        with pytest.raises(InUseError):
            store.remove(artifact.path)
    store.remove(artifact.path)
    with artifact.held() as there:
        assert not there


def test_an_artifact_under_another_name_is_damaged(store):
    artifact = publish(store)
    other = artifact.path.parents[1] / "other" / artifact.fingerprint
    shutil.copytree(artifact.path, other)
    with pytest.raises(DamagedError, match="does not hash to its folder's name"):
        store.verify(store.get("other", artifact.fingerprint))


def test_provenance_is_advice(store):
    artifact = publish(store)
    for spoil in (lambda path: path.write_text("["), Path.unlink, os.mkfifo):
        spoil(artifact.path / "provenance.json")
        assert artifact.provenance == {}
        store.verify(artifact)
