import errno
import json
import math
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest

from dirotq.errors import ArtifactError
from dirotq.pipeline import locks
from dirotq.pipeline.artifact import SCHEMA
from dirotq.pipeline.disk import write_json
from dirotq.pipeline.locks import InUseError
from dirotq.pipeline.manifest import DamagedError
from dirotq.pipeline.store import Artifact, ArtifactStore

RECIPE = {"stage": {"class": "toy", "scale": 1}, "inputs": {}}


def publish(store: ArtifactStore, recipe=RECIPE, **options) -> Artifact:
    with store.create("toy", recipe, **options) as draft:
        if draft.artifact is None:
            (draft.data / "tree" / "deep").mkdir(parents=True)
            (draft.data / "one.txt").write_text("one")
            (draft.data / "tree" / "deep" / "two.txt").write_text("two")
            draft.metrics["psnr"] = math.inf
    return draft.artifact


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_publish_and_read(store):
    artifact = publish(store)
    assert store.get("toy", artifact.fingerprint) == artifact
    assert artifact.file("one.txt").read_text() == "one"
    assert (artifact.tree("tree") / "deep" / "two.txt").read_text() == "two"
    assert artifact.metrics == {"psnr": math.inf}
    assert artifact.bytes == 6
    assert artifact.manifest["recipe"] == RECIPE
    assert artifact.provenance["seconds"] >= 0
    assert artifact.provenance["peak_rss_bytes"] > 1e6
    store.verify(artifact)
    assert not store.list()[1:]
    assert not list(store.root.glob("toy/*.*"))  # neither partial nor trash


def test_all_is_on_the_disk_before_it_is_published(store, monkeypatch):
    before, after = set(), set()

    def fsync(handle: int) -> None:
        (after if store.list() else before).add(os.fstat(handle).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    folder = publish(store).path
    assert {path.stat().st_ino for path in (folder, *folder.rglob("*"))} <= before
    assert folder.parent.stat().st_ino in after  # the name itself


def test_manifest_is_plain_json(store):
    text = (publish(store).path / "manifest.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_unknown_names_say_what_there_is(store):
    artifact = publish(store)
    with pytest.raises(ArtifactError, match=r"no file 'nine\.txt'; it has one\.txt, tree"):
        artifact.file("nine.txt")
    with pytest.raises(ArtifactError, match="no folder 'one'; it has"):
        artifact.tree("one")
    with pytest.raises(ArtifactError, match="no file"):
        artifact.file("../manifest.json")


def damage_byte(artifact):
    path = artifact.data / "tree" / "deep" / "two.txt"
    path.write_text("twO")


def damage_length(artifact):
    (artifact.data / "tree" / "deep" / "two.txt").write_text("two more")


def damage_missing(artifact):
    (artifact.data / "tree" / "deep" / "two.txt").unlink()


def damage_stranger(artifact):
    (artifact.data / "tree" / "three.txt").write_text("3")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_byte, "two.txt changed after it was written"),
        (damage_length, "two.txt has 8 bytes instead of 3"),
        (damage_missing, "two.txt is missing"),
        (damage_stranger, "three.txt was not written by the stage"),
    ],
)
def test_damage_is_seen_by_verify_and_by_a_reader(store, damage, says):
    artifact = publish(store)
    artifact.tree("tree")  # a digest that was right once must not hide what happened since
    damage(artifact)
    for read in (lambda: artifact.tree("tree"), lambda: store.verify(artifact)):
        with pytest.raises(ArtifactError, match=says) as caught:
            read()
        assert str(artifact) in str(caught.value)
        assert f"dirotq verify --remove {artifact}" in str(caught.value)
        assert "force=[toy]" in str(caught.value)
    assert artifact.file("one.txt").read_text() == "one"  # the rest stays readable


def test_verify_holds_the_recipe_against_the_name(store):
    artifact = publish(store)
    rewrite(artifact.path / "manifest.json", recipe={"stage": "other"})
    with pytest.raises(ArtifactError, match="does not hash to its folder's name"):
        store.verify(store.get("toy", artifact.fingerprint))


def test_manifest_that_is_no_json(store):
    artifact = publish(store)
    (artifact.path / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="no valid JSON"):
        store.get("toy", artifact.fingerprint).file("one.txt")


def test_newer_schema_is_refused(store):
    artifact = publish(store)
    rewrite(artifact.path / "manifest.json", schema=SCHEMA + 1)
    with pytest.raises(ArtifactError, match=f"has schema {SCHEMA + 1}.*reads up to {SCHEMA}"):
        store.get("toy", artifact.fingerprint).file("one.txt")
    rewrite(store.root / "dirotq-store.json", schema=SCHEMA + 1)
    with pytest.raises(ArtifactError, match=r"newer version wrote it\. Upgrade DiRotQ"):
        ArtifactStore(store.root)


def test_a_crash_publishes_nothing_and_the_next_run_starts_clean(store):
    with pytest.raises(RuntimeError), store.create("toy", RECIPE) as draft:
        (draft.data / "half").write_text("x")
        raise RuntimeError
    assert store.list() == []
    assert draft.data.joinpath("half").exists()
    assert "half" not in publish(store).manifest["files"]


def test_resume_finds_what_was_left(store):
    with pytest.raises(KeyboardInterrupt), store.create("toy", RECIPE, resume=True) as draft:
        (draft.data / "half").write_text("x")
        raise KeyboardInterrupt
    assert "half" in publish(store, resume=True).manifest["files"]


def test_published_artifact_is_taken(store):
    first = publish(store)
    with store.create("toy", RECIPE) as draft:
        assert draft.artifact == first


def test_force_replaces(store):
    artifact = publish(store)
    damage_byte(artifact)
    publish(store, force=True)
    store.verify(artifact)
    assert len(list((store.root / "toy").iterdir())) == 1


def test_force_that_fails_keeps_the_old_one(store):
    artifact = publish(store)
    with pytest.raises(RuntimeError), store.create("toy", RECIPE, force=True):
        raise RuntimeError
    store.verify(artifact)


def test_the_one_who_waits_takes_the_result(store):
    computed, inside, go = [], threading.Event(), threading.Event()

    def work(wait: bool) -> None:
        with ArtifactStore(store.root).create("toy", RECIPE) as draft:
            if draft.artifact is None:
                computed.append(draft)
                inside.set()
                if wait:
                    go.wait(10)
                (draft.data / "x").write_text("x")

    first = threading.Thread(target=work, args=[True])
    first.start()
    assert inside.wait(10)
    second = threading.Thread(target=work, args=[False])
    second.start()
    go.set()
    first.join(10)
    second.join(10)
    assert len(computed) == 1
    store.verify(store.list()[0])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        ValueError("I/O error: No space left on device (os error 28)"),  # safetensors' way
    ],
)
def test_full_disk(store, error):
    says = r"disk is full.*bytes free.*same command resumes"
    with pytest.raises(ArtifactError, match=says) as e, store.create("toy", RECIPE) as draft:
        (draft.data / "half").write_text("x")
        raise error
    assert str(store.root) in str(e.value)
    assert (draft.data / "half").exists()


def test_full_disk_for_real(store):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(ArtifactError, match="disk is full"), store.create("toy", RECIPE):
        Path("/dev/full").write_text("x")


def test_other_errors_stay_as_they_are(store):
    with pytest.raises(FileNotFoundError), store.create("toy", RECIPE) as draft:
        (draft.data / "absent").read_text()


def test_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ArtifactError, match=r"cannot be written.*store=FOLDER"):
        publish(ArtifactStore(tmp_path / "file"))


def test_urls_are_refused_not_faked():
    with pytest.raises(ArtifactError, match="only local folders"):
        ArtifactStore("s3://bucket/artifacts")


def test_find(store):
    one, two = publish(store), publish(store, {"stage": "other", "inputs": {}})
    assert store.find(str(one)) == store.find(one.fingerprint[:8]) == one
    assert store.find(f"toy/{two.fingerprint[:8]}") == two
    with pytest.raises(ArtifactError, match="several artifacts match 'toy'"):
        store.find("toy")
    with pytest.raises(ArtifactError, match=f"no artifact matches 'rank/abc'.*{one}"):
        store.find("rank/abc")


def test_leftovers_spare_the_living(store):
    with store.create("toy", RECIPE):
        assert list(ArtifactStore(store.root).leftovers()) == []
    with pytest.raises(RuntimeError), store.create("toy", {"stage": 2}) as draft:
        raise RuntimeError
    assert list(store.leftovers()) == [draft.data.parent]


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


@pytest.mark.parametrize("content", ["", '{"sch', "null", "{}", '{"schema": "1"}'])
def test_a_torn_marker_is_written_anew(store, content, caplog):
    publish(store)
    marker = store.root / "dirotq-store.json"
    marker.write_text(content)
    again = ArtifactStore(store.root)
    assert again.list()
    publish(again, {"stage": "other", "inputs": {}})
    assert json.loads(marker.read_text()) == {"schema": SCHEMA}


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


def test_a_killed_publication_leaves_no_scratch_in_the_artifact(store):
    with pytest.raises(KeyboardInterrupt), store.create("toy", RECIPE, resume=True) as draft:
        (draft.data.parent / ".manifest.json.4711").write_text("half")
        raise KeyboardInterrupt
    artifact = publish(store, resume=True)
    assert {p.name for p in artifact.path.iterdir()} == {"manifest.json", "provenance.json", "data"}


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


def test_a_folder_without_manifest_is_made_anew(store):
    artifact = publish(store)
    (artifact.path / "manifest.json").unlink()
    assert store.get("toy", artifact.fingerprint) is None
    store.verify(publish(store))


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


def test_removing_needs_no_room_on_the_disk(store, monkeypatch):
    artifact = publish(store)
    for lock in (store.root / ".locks").iterdir():
        lock.unlink()
    monkeypatch.setattr(locks, "_opened", full_disk)
    store.remove(artifact.path)
    assert store.list() == []


def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


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
