"""``verify`` and ``gc`` on stores that something happened to: all is named, nothing stops them."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import race

from dirotq.pipeline.manifest import sealed
from dirotq.pipeline.store import ArtifactStore

KEY = "0123456789abcdef"


@pytest.fixture
def filled(store):
    race.run(store)
    return store


def manifest(store, stage):
    [artifact] = [a for a in store.everything() if a.stage == stage]
    return artifact.path / "manifest.json"


def rewrite(path, **changes):
    """Change a manifest, its digest too: what is tried is what lies behind that."""
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | changes)))


def bound(path):
    path.unlink()
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path may have 108 letters
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


def link(path):
    path.rename(path.with_name("other.json")).chmod(0o644)
    path.symlink_to("other.json")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


MANIFESTS = {
    "does not exist": Path.unlink,
    "is a named pipe": pipe,
    "is a socket": bound,
    "is a symbolic link": link,
    "is a folder": lambda path: (path.unlink(), path.mkdir()),
    "no valid JSON": lambda path: path.write_text(""),
    "expected a JSON object": lambda path: path.write_text("[]"),
    "its files is": lambda path: rewrite(path, files=[]),
    "its recipe is None": lambda path: rewrite(path, recipe=None),
    "'../../ext', which is not a path": lambda path: rewrite(
        path, files={"../../ext": {"sha256": "0" * 64, "bytes": 0}}
    ),
    "its recipe does not hash": lambda path: rewrite(path, recipe={"n": 1}),
    "of the file 'x' it says 1": lambda path: rewrite(path, files={"x": 1}),
}


@pytest.mark.parametrize("says", MANIFESTS)
def test_a_damaged_manifest_is_named_removed_and_made_again(dirotq, filled, says):
    MANIFESTS[says](manifest(filled, "squares"))
    found = dirotq("verify")
    assert found.status == 2
    line = next(line for line in found.out.splitlines() if line.startswith("DAMAGED"))
    assert says in line
    assert "squares/" in line
    assert "2 of 3 artifacts are intact" in found.out
    assert "Traceback" not in found.err
    removed = dirotq("verify", "--remove")
    assert removed.out.count("removed") >= 1
    assert dirotq("verify").status == 0
    assert race.run(filled) == 14
    assert "3 of 3" in dirotq("verify").out


@pytest.mark.parametrize("says", list(MANIFESTS)[:-2])
def test_gc_lists_and_removes_it_too(dirotq, filled, says):
    MANIFESTS[says](manifest(filled, "squares"))
    listed = dirotq("gc")
    assert listed.status == 0
    assert listed.out.count("damaged: `dirotq verify` says how") == 1
    dirotq("gc", "--yes")
    assert len(filled.everything()) == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (os.mkfifo, "it is no folder"),
        (Path.touch, "it is no folder"),
        (lambda path: path.symlink_to("/nowhere/at/all"), "a link to /nowhere/at/all, where there"),
        (Path.mkdir, "manifest.json does not exist"),
    ],
)
def test_what_is_only_named_like_an_artifact(dirotq, filled, make, says):
    make(filled.root / "squares" / KEY)
    found = dirotq("verify")
    assert found.status == 2
    assert says in found.out
    assert "3 of 4 artifacts are intact" in found.out
    assert race.run(filled) == 14
    dirotq("gc", "--yes")
    assert not os.path.lexists(filled.root / "squares" / KEY)
    assert dirotq("verify").status == 0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (os.mkfifo, "was not written by the stage"),
        (lambda path: path.symlink_to("/"), "was not written by the stage"),
        (lambda path: path.write_text("x"), "was not written by the stage"),
    ],
)
@pytest.mark.parametrize("name", ["extra", b"caf\xe9".decode(errors="surrogateescape")])
def test_strangers_in_data(dirotq, filled, make, says, name):
    make(manifest(filled, "squares").parent / "data" / name)
    found = dirotq("verify")
    assert found.status == 2
    assert says in found.out
    assert "2 of 3 artifacts are intact" in found.out


def test_a_newer_artifact_is_neither_damaged_nor_removed(dirotq, filled):
    rewrite(manifest(filled, "squares"), schema=2)
    found = dirotq("verify", "--remove")
    assert found.status == 2
    assert "FAILED   squares/" in found.out
    assert "a newer version wrote it" in found.out
    assert "damaged" not in dirotq("gc", "--yes").out
    assert len(filled.everything()) == 3


PROVENANCE = [
    "",
    "[]",
    "{}",
    '{"seconds": "1", "estimate": 3}',
    '{"seconds": 1e999}',
    '{"seconds": null, "peak_rss_bytes": -1}',
    '{"seconds": 1, "peak_rss_bytes": 1, "peak_vram_bytes": "x"}',
]


def test_provenance_is_advice(dirotq, filled):
    for content in PROVENANCE:
        for artifact in filled.list():
            (artifact.path / "provenance.json").write_text(content)
        assert dirotq("plan", "squares.power=3").status == 0
    for args in (["compress"], ["explain"], ["verify"], ["gc"]):
        result = dirotq(*args)
        assert result.status == 0, result.err


def test_a_damaged_artifact_of_another_recipe_stops_no_plan(dirotq, filled):
    manifest(filled, "squares").write_text("{")
    for verb in ("plan", "explain", "compress"):
        assert dirotq(verb, "squares.power=3").status == 0


def test_keep_nothing_keeps_nothing(dirotq, filled):
    assert dirotq("gc", "--keep=0", "--yes").status == 0
    assert filled.everything() == []


@pytest.mark.parametrize("count", ["-1", "x"])
def test_keep_is_a_count(dirotq, filled, count, capsys):
    result = dirotq("gc", f"--keep={count}", "--yes")
    assert result.status == 2
    assert "--keep" in result.err
    assert len(filled.list()) == 3


def record(store, number=-1):
    return sorted((store.root / "runs").glob("*/artifacts.json"))[number]


def odd_record(path):
    path.write_text('{"pack": 7}')


@pytest.mark.parametrize(
    "spoil", [lambda path: path.write_text(""), odd_record, pipe, lambda p: (p.unlink(), p.mkdir())]
)
def test_a_damaged_record_stops_nobody_and_spares_what_it_may_name(dirotq, filled, spoil):
    race.run(filled, 3)
    spoil(last := record(filled))  # which alone refers to two of five artifacts
    once = dirotq("gc", "--keep=1")
    assert once.status == 0
    assert "the record of a run, damaged; what nothing else refers to" in once.out
    assert once.out.count("none of the last 1 runs") == 3  # what older runs refer to, and no more
    dirotq("gc", "--keep=1", "--yes")
    assert len(filled.list()) == 2
    assert not os.path.lexists(last)
    assert "record" not in dirotq("gc", "--keep=1").out
    dirotq("gc", "--keep=0", "--yes")
    assert filled.everything() == []


def test_records_are_written_whole_or_not_at_all(dirotq, filled, monkeypatch):
    from dirotq.pipeline import disk

    def full(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "sync", full)
        result = dirotq("compress", "squares.power=3")
    assert result.status == 2
    assert "disk is full" in result.err
    assert len(list((filled.root / "runs").rglob("*artifacts.json*"))) == 1
    assert dirotq("gc").status == 0


def test_scratch_files_of_killed_processes(dirotq, filled):
    left = [
        filled.root / ".dirotq-store.json.4711",
        record(filled).parent / ".artifacts.json.0123456789abcdef",
    ]
    for path in left:
        path.write_text("half")
    assert dirotq("verify").status == 0
    assert dirotq("gc").out.count("left by an interrupted run") == 2
    dirotq("gc", "--yes")
    assert not any(path.exists() for path in left)
    assert len(filled.list()) == 3


def test_gc_and_verify_pass_over_what_is_in_use(dirotq, filled):
    artifact = filled.list()[0]
    with artifact.held():
        result = dirotq("gc", "--keep=0", "--yes")
    assert result.status == 0
    assert "in use by another process, passed over" in result.out
    assert filled.list() == [artifact]
    with (
        pytest.raises(RuntimeError),
        filled.create(artifact.stage, artifact.manifest["recipe"], force=True),
    ):
        found = dirotq("verify")
        raise RuntimeError
    assert found.status == 0
    assert f"in use   {artifact}" in found.out
    assert "0 of 0 artifacts are intact; 1 could not be looked at" in found.out


def test_what_can_not_be_removed_stops_nothing(dirotq, filled, monkeypatch):
    remove = shutil.rmtree

    def stubborn(path, *args):
        if "squares" in str(path):
            raise OSError(16, "Device or resource busy", str(path))
        remove(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stubborn)
        result = dirotq("gc", "--keep=0", "--yes")
    assert result.status == 2
    assert "stays: " in result.out
    assert "resource busy" in result.out
    assert "left by an interrupted run" in dirotq("gc", "--keep=0", "--yes").out
    assert list(filled.root.glob("squares/*")) == []


def test_a_linked_artifact_is_collected(dirotq, filled, tmp_path):
    artifact = filled.list()[0]
    artifact.path.rename(tmp_path / "moved")
    artifact.path.symlink_to(tmp_path / "moved")
    assert dirotq("verify").status == 0
    assert dirotq("gc", "--keep=0", "--yes").status == 0
    assert filled.everything() == []
    assert (tmp_path / "moved" / "manifest.json").exists()


def as_stranger(store: Path, *args: str, home: Path) -> subprocess.CompletedProcess[str]:
    """The toy line's command by somebody who may read the store and not write it."""
    command = [sys.executable, "-m", "toyline", *args, f"store={store}"]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("no setpriv here: root can't act as somebody else")
        caps = "-dac_override,-dac_read_search,-fowner"
        command = ["setpriv", f"--bounding-set={caps}", f"--inh-caps={caps}", *command]
        for path in (store, *store.rglob("*")):
            os.lchown(path, 65534, 65534)
    else:
        for path in (*store.rglob("*"), store):
            path.chmod(path.stat().st_mode & ~0o222)
    root = Path(__file__).resolve().parents[2]
    env = dict(os.environ, HOME=str(home), PYTHONPATH=f"{root}{os.pathsep}{root / 'tests/support'}")
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_a_store_that_can_only_be_read(filled, tmp_path):
    before = sorted(map(str, filled.root.rglob("*")))
    for verb in ("plan", "verify", "compress"):
        done = as_stranger(filled.root, verb, home=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "can only be read: this run's folder is" in done.stderr
    assert str(tmp_path / ".cache" / "dirotq" / "runs") in done.stderr
    refused = as_stranger(filled.root, "compress", "squares.power=3", home=tmp_path)
    assert refused.returncode == 2
    for says in ("cannot be written: no permission to write", "belongs to", "store=FOLDER"):
        assert says in refused.stderr
    kept = as_stranger(filled.root, "gc", "--keep=0", "--yes", home=tmp_path)
    assert kept.returncode == 2
    assert kept.stdout.count("stays: ") == 3
    assert sorted(map(str, filled.root.rglob("*"))) == before


def test_so_can_one_without_lock_files(filled, tmp_path):
    shutil.rmtree(filled.root / ".locks")
    done = as_stranger(filled.root, "compress", home=tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_may_not_be_read_is_named_and_never_removed(filled, tmp_path):
    file = manifest(filled, "squares").parent / "data" / "squares.json"
    file.chmod(0o000)
    found = as_stranger(filled.root, "verify", "--remove", home=tmp_path)
    assert found.returncode == 2
    assert f"no permission to read {file}: it belongs to" in found.stdout
    assert "2 of 3 artifacts are intact" in found.stdout
    refused = as_stranger(filled.root, "compress", "force=total", home=tmp_path)
    assert refused.returncode == 2
    assert "no permission" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert len(ArtifactStore(filled.root).everything()) == 3
