import errno
import json
import os
import tempfile
from pathlib import Path

import pytest
from toy_artifact import RECIPE, publish

from dirotq.pipeline import disk
from dirotq.pipeline.disk import remove_tree, write_json


@pytest.fixture
def late(tmp_path, monkeypatch):
    """``late(3)``: a folder that somebody adds a file to, just before it goes, three times."""

    def made(times: int) -> Path:
        (folder := tmp_path / "desk").mkdir()
        left, real = [*range(times)], os.rmdir

        def rmdir(path, **more):
            if left:
                (folder / f"{left.pop()}.log").touch()
            real(path, **more)

        monkeypatch.setattr(os, "rmdir", rmdir)
        return folder

    return made


def test_a_folder_that_somebody_still_writes_to_goes(late):
    """A worker whose last result is known closes its log: what is left would end the run."""
    folder = late(3)
    remove_tree(folder)
    assert not folder.exists()
    remove_tree(folder)  # is gone


def test_who_never_stops_writing_is_not_waited_for(late, monkeypatch):
    monkeypatch.setattr(disk, "PATIENCE", 0.1)
    with pytest.raises(OSError, match="not empty"):
        remove_tree(late(1000))


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o027, 0o077], indirect=True)
def test_modes_follow_the_umask(store, umask):
    with store.create("toy", RECIPE) as draft:
        inside = Path(tempfile.mkdtemp(dir=draft.data))  # 0700, whatever the umask
        (inside / "weights").write_text("1")
        (inside / "weights").chmod(0o600)  # as safetensors writes
    for path in (store.root, *store.root.rglob("*")):
        whole = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == whole & ~umask, path


def test_a_file_with_several_names_keeps_its_mode(store, tmp_path):
    (tmp_path / "mine").write_text("1")
    (tmp_path / "mine").chmod(0o600)
    with store.create("toy", RECIPE) as draft:
        os.link(tmp_path / "mine", draft.data / "linked")
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600


def test_marker_and_manifest_survive_a_power_cut(store, monkeypatch):
    """Every name that is there was given to a file whose content was on the disk."""
    synced, replace = set(), Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.fstat(handle).st_ino))

    def watched(self, target):
        durable = self.name.startswith(".dirotq-store") or self.is_dir()
        assert not durable or self.stat().st_ino in synced, f"{self} would be empty"
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    publish(store)
    assert store.root.stat().st_ino in synced


def test_a_scratch_file_that_gc_took_is_written_again(tmp_path, monkeypatch):
    replace, taken = Path.replace, []

    def vanishing(self, target):
        if not taken:
            taken.append(self)
            self.unlink()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", vanishing)
    write_json(tmp_path / "x.json", {"a": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_full_disk_leaves_the_old_content_and_no_scratch(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"a": 1})

    def full(self, *args, **options):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
