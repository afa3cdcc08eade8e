"""Artifacts on a URL: there whole or not at all, whoever else pushes; a cache of local stores."""

import json
import multiprocessing
import shutil

import pytest
from faulty_files import FaultyFiles
from faulty_files import faulty as faulty
from race import WIRING, run
from toy_artifact import RECIPE, publish, rewrite
from toyline.stages import Numbers, Squares, Total, ToyModel

from dirotq.errors import ArtifactError
from dirotq.pipeline import dag, parcels
from dirotq.pipeline.executor import LocalExecutor
from dirotq.pipeline.manifest import SCHEMA, DamagedError
from dirotq.pipeline.place import REMOTE_MARKER as MARKER
from dirotq.pipeline.remote_store import RemoteStore
from dirotq.pipeline.stage import fingerprint
from dirotq.pipeline.store import ArtifactStore

KEY = fingerprint(RECIPE)


@pytest.fixture(params=["file", "faulty"])
def url(request, faulty, tmp_path):
    return f"file://{tmp_path}/far" if request.param == "file" else "faulty://far"


@pytest.fixture
def remote(url):
    return RemoteStore(url)


@pytest.fixture
def other(tmp_path, url):
    """The store of another machine."""
    return ArtifactStore(tmp_path / "other", RemoteStore(url))


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_artifact_arrives_as_it_was(store, remote, other):
    artifact = publish(store)
    assert remote.push(artifact).sent == 6
    assert remote.push(artifact) is None
    got = other.pull("toy", KEY)
    assert contents(got.path) == contents(artifact.path)
    other.verify(got)
    assert list(other.leftovers()) == []


def test_without_a_manifest_there_is_nothing(store, remote, other, faulty, monkeypatch):
    artifact = publish(store)
    send = remote.remote.send

    def killed(file, name):
        if name.endswith("manifest.json"):
            raise KeyboardInterrupt
        send(file, name)

    monkeypatch.setattr(remote.remote, "send", killed)
    with pytest.raises(KeyboardInterrupt):
        remote.push(artifact)
    assert remote.manifest("toy", KEY) is None
    assert other.pull("toy", KEY) is None
    monkeypatch.undo()
    remote.push(artifact)
    assert other.pull("toy", KEY)


def test_names_are_found_by_their_beginnings(store, remote):
    remote.push(publish(store))
    for name in (f"toy/{KEY}", f"toy/{KEY[:4]}", KEY[:6], "toy"):
        assert remote.find(name) == ("toy", KEY)
    with pytest.raises(ArtifactError, match=f"no artifact matches 'nix'.*toy/{KEY}"):
        remote.find("nix")
    remote.push(publish(store, RECIPE | {"inputs": {"a": "b"}}))
    with pytest.raises(ArtifactError, match="several artifacts match 'toy'"):
        remote.find("toy")


@pytest.mark.parametrize("name", ["../" + "a" * 16, "x/../" + "a" * 16, "..", "/" + "a" * 16])
def test_names_that_lead_elsewhere_are_none(name, remote):
    with pytest.raises(ArtifactError, match="no artifact matches"):
        remote.find(name)


def test_a_newer_store_is_refused(remote, url):
    remote.remote.write(MARKER, json.dumps({"schema": SCHEMA + 1}).encode())
    with pytest.raises(ArtifactError, match=rf"{MARKER} has schema {SCHEMA + 1}.*Upgrade"):
        RemoteStore(url)


def test_a_local_store_and_a_remote_one_are_not_taken_for_each_other(store, tmp_path):
    publish(store)
    with pytest.raises(ArtifactError, match=r"is a local store.*store=FOLDER"):
        RemoteStore(f"file://{store.root}")
    RemoteStore(f"file://{tmp_path}/far").push(store.find("toy"))
    with pytest.raises(ArtifactError, match=rf"store_remote=file://{tmp_path}/far"):
        ArtifactStore(tmp_path / "far")


def test_a_newer_artifact_is_refused(store, remote, other):
    artifact = publish(store)
    remote.push(artifact)
    rewrite(artifact.path / "manifest.json", schema=SCHEMA + 1)
    remote.remote.send(artifact.path / "manifest.json", f"toy/{KEY}/manifest.json")
    with pytest.raises(ArtifactError, match="newer version"):
        other.pull("toy", KEY)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b'{"schema": 1}', b"\xff\xfe", b'{"schema": 1, "files": {"../x": 1}}'],
)
def test_a_damaged_manifest_is_named_and_mended(text, store, remote, other):
    artifact = publish(store)
    remote.push(artifact)
    remote.remote.write(f"toy/{KEY}/manifest.json", text)
    with pytest.raises(DamagedError, match=rf"{KEY}/manifest.json is damaged"):
        other.pull("toy", KEY)
    assert remote.push(artifact).sent == 6
    assert other.pull("toy", KEY)


def test_a_manifest_of_another_artifact_is_refused(store, remote, other):
    remote.push(publish(store))
    away = publish(store, RECIPE | {"inputs": {"a": "b"}})
    remote.remote.send(away.path / "manifest.json", f"toy/{KEY}/manifest.json")
    with pytest.raises(DamagedError, match="does not hash"):
        other.pull("toy", KEY)


def test_a_damaged_file_is_never_taken_and_force_mends_it(store, other, faulty, monkeypatch):
    monkeypatch.setattr(parcels, "LARGE", 1)
    artifact, remote = publish(store), RemoteStore("faulty://far")
    other.remote = remote
    remote.push(artifact)
    (name,) = (name for name in FaultyFiles.store if name.endswith("data/one.txt"))
    remote.remote.write(name.removeprefix("/far/"), b"onE")
    with pytest.raises(DamagedError, match=r"one\.txt is damaged.*push --force"):
        other.pull("toy", KEY)
    assert other.list() == []
    assert remote.push(artifact) is None
    assert remote.push(artifact, force=True).sent == 6
    assert other.pull("toy", KEY)


def test_what_is_damaged_here_is_not_pushed(store, remote):
    artifact = publish(store)
    (artifact.data / "one.txt").write_text("onE")
    with pytest.raises(DamagedError, match=r"one\.txt changed"):
        remote.push(artifact)
    assert remote.manifest("toy", KEY) is None


def test_lost_provenance_stops_nobody(store, remote, other):
    artifact = publish(store)
    (artifact.path / "provenance.json").write_text("{")
    remote.push(artifact)
    got = other.pull("toy", KEY)
    assert got.provenance == {}


def publish_bytes(root, what):
    store = ArtifactStore(root)
    with store.create("toy", RECIPE) as draft:
        for name in ("one.txt", "tree.txt"):
            (draft.data / name).write_text(f"{name} of {what}" * 50)
    return draft.artifact


def pushes(root, url):
    artifact = ArtifactStore(root).find("toy")
    for _ in range(10):
        RemoteStore(url).push(artifact, force=True)


@pytest.mark.parametrize("bytes_of", ["ab", "aa"])
def test_processes_that_push_one_artifact(bytes_of, tmp_path, monkeypatch):
    """With the same bytes or with others, as another GPU rounds: at every moment, what a third
    process reads is all of one or all of the other."""
    monkeypatch.setattr(parcels, "LARGE", 1)
    url, roots = f"file://{tmp_path}/far", [tmp_path / name for name in "ab"]
    wanted = [contents(publish_bytes(*it).data) for it in zip(roots, bytes_of, strict=True)]
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=pushes, args=(root, url)) for root in roots]
    for worker in workers:
        worker.start()
    read = 0
    while any(worker.is_alive() for worker in workers) or not read:
        store = ArtifactStore(tmp_path / "c", RemoteStore(url))
        if got := store.pull("toy", KEY):
            read += 1
            assert contents(got.data) in wanted
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert {p.name for p in (tmp_path / "far" / "toy" / KEY).iterdir() if p.is_file()} == {
        "manifest.json"
    }


def test_a_run_pulls_what_is_there_and_computes_the_rest(store, remote, other, caplog):
    run(store)
    for stage in ("numbers", "squares"):
        remote.push(store.find(stage))
    caplog.set_level("INFO")
    assert run(other) == 14
    assert f"numbers  taken from {remote}" in caplog.text
    assert "squares  taken from" in caplog.text
    assert "total    running" in caplog.text
    for artifact in other.list():
        other.verify(artifact)
    assert remote.manifest("total", other.find("total").fingerprint) is None  # nobody asked


def test_force_computes_what_is_there(store, remote, other, caplog):
    run(store)
    remote.push(store.find("numbers"))
    caplog.set_level("INFO")
    run(other, force=("numbers",))
    assert "numbers  running" in caplog.text


def test_a_partial_computation_stays_when_its_artifact_is_pulled(store, remote, other):
    """What a killed run of this machine left does not mix with what is pulled."""
    artifact = publish(store)
    remote.push(artifact)
    left = other.root / "toy" / f"{KEY}.partial" / "data" / "half.txt"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    with other.create("toy", RECIPE, resume=True) as draft:
        assert contents(draft.artifact.path) == contents(artifact.path)
        assert draft.source == str(remote)


def test_a_run_over_a_bad_network(store, other, faulty):
    faulty.share = faulty.cut = 0.05
    other.remote = RemoteStore("faulty://far")
    run(store)
    for artifact in store.list():
        other.remote.push(artifact)
    assert run(other) == 14


def steps():
    stages = {
        "numbers": Numbers(
            model=ToyModel(path="", offset=0), count=4, trouble=None, ledger=None, pause=0
        ),
        "squares": Squares(power=2, fail=False),
        "total": Total(),
    }
    return dag.plan(stages, WIRING)


def test_every_artifact_of_a_run_is_handed_on(store):
    handed = []
    for _ in range(2):  # made, then found
        dag.run(steps(), store, LocalExecutor(), finished=lambda one: handed.append(one.stage))
    assert handed == ["numbers", "squares", "total"] * 2
