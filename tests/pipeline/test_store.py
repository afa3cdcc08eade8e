import errno
import json
import math
import os
import threading
from pathlib import Path

import pytest
from toy_artifact import RECIPE, publish, rewrite

from dirotq.errors import ArtifactError
from dirotq.pipeline import locks
from dirotq.pipeline.manifest import SCHEMA
from dirotq.pipeline.store import ArtifactStore


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
    with pytest.raises(ArtifactError, match=r"store_remote=s3://bucket"):
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


@pytest.mark.parametrize("content", ["", '{"sch', "null", "{}", '{"schema": "1"}'])
def test_a_torn_marker_is_written_anew(store, content, caplog):
    publish(store)
    marker = store.root / "dirotq-store.json"
    marker.write_text(content)
    again = ArtifactStore(store.root)
    assert again.list()
    publish(again, {"stage": "other", "inputs": {}})
    assert json.loads(marker.read_text()) == {"schema": SCHEMA}


def test_a_killed_publication_leaves_no_scratch_in_the_artifact(store):
    with pytest.raises(KeyboardInterrupt), store.create("toy", RECIPE, resume=True) as draft:
        (draft.data.parent / ".manifest.json.4711").write_text("half")
        raise KeyboardInterrupt
    artifact = publish(store, resume=True)
    assert {p.name for p in artifact.path.iterdir()} == {"manifest.json", "provenance.json", "data"}


def test_a_folder_without_manifest_is_made_anew(store):
    artifact = publish(store)
    (artifact.path / "manifest.json").unlink()
    assert store.get("toy", artifact.fingerprint) is None
    store.verify(publish(store))


def test_removing_needs_no_room_on_the_disk(store, monkeypatch):
    artifact = publish(store)
    for lock in (store.root / ".locks").iterdir():
        lock.unlink()
    monkeypatch.setattr(locks, "_opened", full_disk)
    store.remove(artifact.path)
    assert store.list() == []


def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")
