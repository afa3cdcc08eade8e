"""`dirotq push`, `dirotq pull`, store_remote= and store_push= as people type them."""

import errno
import json
import os
import time

import pytest
from faulty_files import FaultyFiles
from faulty_files import faulty as faulty

from dirotq.files.sums import check_sums, write_sums
from dirotq.pipeline import remote_folder
from dirotq.pipeline.parcels import SENT
from dirotq.pipeline.store import ArtifactStore

FAR = "faulty://far"


@pytest.fixture(autouse=True)
def far(faulty):
    return faulty


@pytest.fixture
def made(dirotq, store):
    assert dirotq("compress").status == 0
    return {artifact.stage: artifact for artifact in store.list()}


@pytest.fixture
def packed(tmp_path):
    folder = tmp_path / "mine"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"transformer": ["dirotq", "X"]}))
    (folder / "transformer" / "weights.safetensors").write_bytes(os.urandom(3 << 20))
    (folder / "transformer" / "config.json").write_text("{}")
    (folder / "README.md").write_text("# mine")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "token").write_text("private")
    (folder / "away.txt").symlink_to("/etc/passwd")
    write_sums(folder)
    return folder


def test_the_last_run_goes_and_comes(dirotq, made, tmp_path):
    first = dirotq("push", "last", FAR)
    assert first.status == 0
    assert [line.split()[:2] for line in first.out.splitlines()] == [
        ["pushed", str(made[stage])] for stage in ("numbers", "squares", "total")
    ]
    assert dirotq("push", "last", FAR).out.count("there ") == 3
    assert dirotq("pull", FAR, f"--store={tmp_path}/b").status == 0
    other = ArtifactStore(tmp_path / "b")
    assert [str(a) for a in other.list()] == [str(a) for a in made.values()]
    again = dirotq("pull", FAR, f"store={tmp_path}/b")
    assert again.out.count("there ") == 3


def test_one_artifact_goes_and_comes(dirotq, made, tmp_path):
    assert dirotq("push", "total", FAR).status == 0
    found = dirotq("pull", FAR, made["total"].fingerprint[:5], "--store", f"{tmp_path}/b")
    assert str(tmp_path / "b" / "total") in found.out
    assert [a.stage for a in ArtifactStore(tmp_path / "b").list()] == ["total"]


def test_a_second_machine_computes_nothing(dirotq, made, tmp_path):
    dirotq("push", "last", FAR)
    remote = [f"store={tmp_path}/b", f"store_remote={FAR}"]
    plan = dirotq("plan", *remote)
    assert plan.out.count("to pull") == 4
    assert "3 to pull, 38 bytes" in plan.out
    found = dirotq("compress", *remote, "squares.fail=true")
    assert found.status == 0, found.err
    assert "running" not in found.err
    assert dirotq("plan", *remote).out.count("cached") == 4


def test_what_is_not_there_is_computed_and_pushed_if_asked(dirotq, store):
    remote = f"store_remote={FAR}"
    assert dirotq("compress", "until=squares", remote).status == 0
    assert not FaultyFiles.store
    plan = dirotq("plan", remote)
    assert "1 to run" in plan.out
    found = dirotq("compress", remote, "store_push=true")
    assert found.status == 0
    assert found.err.count("pushed ") == 3  # found ones too
    assert sum(name.endswith("/manifest.json") for name in FaultyFiles.store) == 3
    record = store.find("total").provenance["overrides"]
    assert f"store_remote={FAR}" in [word.replace("'", "") for word in record]


def test_a_push_that_fails_ends_no_run_and_is_told(dirotq, store, far, monkeypatch):
    def put_file(self, *args, **kwargs):
        raise PermissionError("Access Denied")

    with monkeypatch.context() as patch:
        patch.setattr(FaultyFiles, "put_file", put_file)
        found = dirotq("compress", f"store_remote={FAR}", "store_push=true")
    assert found.status == 2
    assert "3 of 3 artifacts were not pushed" in found.err
    assert len(store.list()) == 3
    assert dirotq("compress", f"store_remote={FAR}", "store_push=true").status == 0


def test_a_pull_that_fails_ends_the_run(dirotq, made, tmp_path, far):
    dirotq("push", "last", FAR)
    for name in [name for name in FaultyFiles.store if name.endswith("squares.json")]:
        FaultyFiles().rm_file(name)
    found = dirotq("compress", f"store={tmp_path}/b", f"store_remote={FAR}")
    assert found.status == 2
    assert "squares.json is damaged: there is no such object" in found.err
    assert found.err.count("dirotq: ") == 1


def test_a_full_disk_while_pulling(dirotq, made, tmp_path, monkeypatch):
    dirotq("push", "last", FAR)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dirotq.pipeline.remote.Remote.fetch", full)
        found = dirotq("pull", FAR, "numbers", "--store", f"{tmp_path}/b")
    assert found.status == 2
    assert "the disk is full: writing numbers/" in found.err
    assert dirotq("pull", FAR, "--store", f"{tmp_path}/b").status == 0


def test_a_packed_folder_goes_and_comes(dirotq, packed, tmp_path, monkeypatch):
    place = f"{FAR}/models/mine"
    assert dirotq("push", str(packed), place).status == 0
    assert not [name for name in FaultyFiles.store if "token" in name or "away" in name]
    assert not [name for name in FaultyFiles.store if name.endswith(SENT)]
    assert "there " in dirotq("push", str(packed), place).out
    monkeypatch.chdir(tmp_path / "mine")
    found = dirotq("pull", place)
    assert found.status == 0, found.err
    got = packed / "mine"
    assert check_sums(got)
    assert (got / "README.md").read_text() == "# mine"
    assert not (packed / "mine.pull").exists()
    assert "is there already" in dirotq("pull", place).err
    assert dirotq("pull", place, "--out", str(tmp_path / "second")).status == 0


def test_an_interrupted_folder_is_not_there_and_goes_on(dirotq, packed, far, tmp_path):
    far.after = 8  # all but the list of files
    assert dirotq("push", str(packed), FAR).status == 2
    far.after = None
    assert "holds none that was pushed" in dirotq("pull", FAR, "--out", str(tmp_path / "x")).err
    assert "had arrived before" in dirotq("push", str(packed), FAR).out
    far.after = sum(far.asked.values()) + 4
    assert dirotq("pull", FAR, "--out", str(tmp_path / "x")).status == 2
    assert not (tmp_path / "x").exists()
    far.after = None
    assert dirotq("pull", FAR, "--out", str(tmp_path / "x")).status == 0
    assert check_sums(tmp_path / "x")


def test_another_folder_takes_the_place_whole(dirotq, packed, tmp_path):
    dirotq("push", str(packed), FAR)
    (packed / "transformer" / "weights.safetensors").write_bytes(os.urandom(3 << 20))
    write_sums(packed)
    assert dirotq("push", str(packed), FAR).out.startswith("pushed")
    assert dirotq("pull", FAR, "--out", str(tmp_path / "x")).status == 0
    names = ("SHA256SUMS", "transformer/weights.safetensors")
    assert all((tmp_path / "x" / n).read_bytes() == (packed / n).read_bytes() for n in names)


def test_a_folder_that_changed_or_has_no_list_is_not_pushed(dirotq, packed):
    (packed / "transformer" / "config.json").write_text("{ }")
    assert "config.json changed" in dirotq("push", str(packed), FAR).err
    (packed / "SHA256SUMS").unlink()
    assert "has no SHA256SUMS" in dirotq("push", str(packed), FAR).err
    assert not FaultyFiles.store


def test_two_pulls_to_one_place(packed, dirotq, tmp_path):
    dirotq("push", str(packed), FAR)
    (tmp_path / "x.pull").mkdir()
    with remote_folder._alone(tmp_path / "x.pull"):
        found = dirotq("pull", FAR, "--out", str(tmp_path / "x"))
    assert (found.status, "another process is pulling" in found.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["push", "total", "/tmp/far"], "is no URL of a remote store"),
        (["push", "total", "nix://far/x"], "knows no protocol nix://"),
        (["push", "nix", FAR], "no artifact matches 'nix'"),
        (["push", "/tmp", FAR], "is no packed folder"),
        (["pull", FAR], "holds no packed folder and no run"),
        (["pull", FAR, "total"], "no artifact matches 'total'"),
        (["pull", FAR, "total/" + "a" * 16], "has no artifact total/a"),
        (["pull", FAR, "--out", "x"], "--out is for a packed folder"),
        (["push", "total", "s3://me:secret@far/x"], "holds what looks like a key"),
        (["compress", "store_push=true"], "add store_remote=URL"),
        (["compress", "store_remote=7"], "is no URL"),
        (["compress", "store_remote=nix://far/x"], "knows no protocol nix://"),
        (["compress", "store_remote=/tmp/far"], "is no URL of a remote store"),
        (["plan", "store_push=7", f"store_remote={FAR}"], "allowed is true or false"),
    ],
)
def test_wrong_words(words, says, dirotq):
    found = dirotq(*words)
    assert found.status == 2
    assert says in found.err
    assert "Traceback" not in found.err
    assert "secret" not in found.err


def test_no_run_yet(dirotq):
    assert "has no run yet" in dirotq("push", "last", FAR).err


def test_a_dead_network_is_one_paragraph(dirotq, made, far):
    far.after = 0
    began = time.monotonic()
    found = dirotq("compress", f"store_remote={FAR}", "force=total")
    assert found.status == 2
    assert "after 7 attempts: ConnectionResetError: the network is gone" in found.err
    assert time.monotonic() - began < 5


def test_the_command_of_a_card_names_no_bucket(made, dirotq, monkeypatch):
    from dirotq.pipeline.command import command, running

    with running([f"store_remote={FAR}", "store_push=true", "squares.power=3"]):
        assert command() == "dirotq compress squares.power=3"
