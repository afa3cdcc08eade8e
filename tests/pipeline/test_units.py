import errno
import json
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dirotq.errors import ArtifactError, UnsupportedError
from dirotq.pipeline import units as module
from dirotq.pipeline.store import ArtifactStore
from dirotq.pipeline.units import JOURNAL, Units, retire

CONTENT = {"a": ["a.bin"], "b": ["b.bin", "b/more.bin"], "c": ["shared.json", "c.bin"], "d": []}
"""Units and their files; ``d`` shares one with ``c``."""


def fill(out):
    """Four finished units."""
    units = Units(out)
    for name, files in CONTENT.items():
        for file in files:
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            (out / file).write_bytes(f"content of {file}".encode())
        units.finish(name, [out / file for file in files or ["shared.json"]])
    return out


def finished(out):
    units = Units(out)
    return {name for name in CONTENT if units.done(name)}


def entry(out, name):
    (file,) = (f for f in (out / JOURNAL).iterdir() if json.loads(f.read_text())["unit"] == name)
    return file


@pytest.fixture
def out(tmp_path):
    return fill(tmp_path / "out")


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("units") / "out")


def files(out):
    return {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - {
        f"{JOURNAL}/{p.name}" for p in (out / JOURNAL).glob("*")
    }


def test_large_files_go_to_the_disk_as_they_are_finished(tmp_path, monkeypatch):
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.fstat(handle).st_ino))
    units, files = Units(tmp_path), [tmp_path / name for name in ("small", "large", "larger")]
    for file, size in zip(files, (module.LARGE - 1, module.LARGE, 3 * module.LARGE), strict=True):
        file.write_bytes(bytes(size))
    units.finish("all", files)
    assert synced == {file.stat().st_ino for file in files[1:]}


def test_what_is_finished_stays_finished(out):
    before = {file: (out / file).stat().st_mtime_ns for file in files(out)}
    assert finished(out) == set(CONTENT)
    assert {file: (out / file).stat().st_mtime_ns for file in files(out)} == before


def test_an_empty_folder_and_one_that_is_not_there_hold_nothing(tmp_path):
    assert not finished(tmp_path)
    assert not finished(tmp_path / "absent")


DAMAGES = {
    "flip": lambda path, data: path.write_bytes(bytes([data[0] ^ 1]) + data[1:]),
    "empty": lambda path, data: path.write_bytes(b""),
    "half": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "zeros": lambda path, data: path.write_bytes(bytes(len(data))),
    "longer": lambda path, data: path.write_bytes(data + b"\n\0"),
    "gone": lambda path, data: path.unlink(),
    "folder": lambda path, data: (path.unlink(), path.mkdir(), (path / "x").touch()),
    "link": lambda path, data: (
        path.rename(path.with_name("moved")),
        path.symlink_to("moved"),
    ),
    "dangling": lambda path, data: (path.unlink(), path.symlink_to("nowhere")),
    "fifo": lambda path, data: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("file", "lost"),
    [
        ("a.bin", {"a"}),
        ("b/more.bin", {"b"}),
        ("shared.json", {"c", "d"}),
        ("entry of a", {"a"}),
        ("entry of d", {"d"}),
    ],
)
def test_a_damaged_unit_is_not_done_and_its_files_are_gone(out, file, lost, damage):
    path = entry(out, file[-1]) if file.startswith("entry") else out / file
    DAMAGES[damage](path, path.read_bytes())
    left = set(CONTENT) - lost
    assert finished(out) == left
    kept = {file for name in left for file in CONTENT[name] or ["shared.json"]}
    assert files(out) == kept
    assert finished(fill(out)) == set(CONTENT)


@pytest.mark.parametrize(
    "entry_text",
    ["", "{", "null", "[]", "[" * 100_000, '{"unit": 5}', '{"unit": "a"}', "\ud800",
     '{"unit": "a", "files": []}', '{"unit": "a", "files": {"a.bin": null}}',
     '{"unit": "a", "files": {"a.bin": {}}}', '{"unit": "\\ud800", "files": {}}',
     '{"unit": "a", "files": {"../outside": null}}', '{"unit": "b", "files": {}}',
     '{"unit": "a", "files": {"b": null}}'],
)  # fmt: skip
def test_an_entry_of_an_odd_shape_says_nothing(out, entry_text):
    entry(out, "a").write_bytes(entry_text.encode(errors="surrogatepass"))
    assert finished(out) == {"b", "c", "d"}
    assert not (out / "a.bin").exists()


def test_an_entry_under_the_name_of_another_says_nothing(out):
    shutil.copy(entry(out, "b"), entry(out, "a"))
    assert finished(out) == {"b", "c", "d"}


def test_a_file_outside_is_neither_counted_nor_touched(out, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("x")
    digest = module._entry(outside)
    text = json.dumps({"unit": "a", "files": {"../outside": digest, str(outside): digest}})
    entry(out, "a").write_text(text)
    assert finished(out) == {"b", "c", "d"}
    assert outside.exists()


def test_nothing_of_a_folder_without_a_journal_counts(out):
    """As versions before 0.4 left it."""
    shutil.rmtree(out / JOURNAL)
    assert not finished(out)
    assert not list(out.iterdir())


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_journal_that_is_no_folder(out, tmp_path, kind):
    moved = shutil.move(out / JOURNAL, tmp_path / "journal")
    (out / JOURNAL).touch() if kind == "file" else (out / JOURNAL).symlink_to(moved)
    assert not finished(out)
    assert finished(fill(out)) == set(CONTENT)


def test_strangers_go_and_what_they_point_at_stays(out, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").touch()
    (out / "sites" / "deep").mkdir(parents=True)
    (out / "sites" / "deep" / "X.partial").touch()
    (out / "b" / ".safetensors.tmp").touch()
    (out / JOURNAL / ".scratch.json.123").touch()
    (out / "into").symlink_to(other)
    os.mkfifo(out / "fifo")
    assert finished(out) == set(CONTENT)
    assert files(out) == {f for names in CONTENT.values() for f in names}
    assert not (out / "sites").exists() and not os.path.lexists(out / "into")
    assert len(list((out / JOURNAL).iterdir())) == len(CONTENT)
    assert (other / "mine").exists()


def test_a_file_that_looks_after_itself_stays(out):
    (out / "answers.jsonl").touch()
    Units(out, apart=["answers.jsonl"])
    assert (out / "answers.jsonl").exists()
    Units(out)
    assert not (out / "answers.jsonl").exists()


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_flipped_bit_and_no_cut_passes(template, tmp_path, data):
    """Whatever else changes, a unit that counts is byte for byte as it was finished."""
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    shutil.copytree(template, out)
    want = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    victim = data.draw(st.sampled_from(sorted(want)))
    content = bytearray(want[victim])
    if data.draw(st.booleans()):
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    (out / victim).write_bytes(content)
    done = finished(out)
    hit = {"shared.json": {"c", "d"}, "b/more.bin": {"b"}}.get(
        victim.as_posix(), {victim.name[0]} if victim.parts[0] != JOURNAL else set()
    )
    assert not hit & done
    assert len(done) >= len(CONTENT) - max(len(hit), 1)
    for name in done:
        for file in CONTENT[name]:
            assert (out / file).read_bytes() == want[(out / file).relative_to(out)]


def test_todo_keeps_the_order_and_says_what_was_found(out, caplog):
    caplog.set_level("INFO")
    assert Units(out).todo(["z", "a", "y", "b"], str, "letters") == ["z", "y"]
    assert "letters: 2 of 4 were finished before" in caplog.text
    caplog.clear()
    assert Units(out).todo(["y"], str, "letters") == ["y"]
    assert not caplog.text


def test_a_unit_finished_anew_replaces_its_entry(out):
    (out / "a.bin").write_text("other")
    units = Units(out)
    units.finish("b", [out / "b.bin"])
    assert units.done("b") and not units.done("a")
    assert finished(out) == {"b", "c", "d"}
    assert not (out / "b").exists()  # the new entry does not name it


def test_a_folder_counts_with_all_that_is_in_it(tmp_path):
    units = Units(tmp_path)
    (tmp_path / "x.zarr" / "c").mkdir(parents=True)
    for name in ("zarr.json", "c/0", "c/1"):
        (tmp_path / "x.zarr" / name).write_text(name)
    units.finish("x", [tmp_path / "x.zarr"])
    assert Units(tmp_path).done("x")
    (tmp_path / "x.zarr" / "c" / "1").unlink()
    assert not Units(tmp_path).done("x")


def test_a_unit_without_its_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.bin of the unit 'x'"):
        Units(tmp_path).finish("x", [tmp_path / "absent.bin"])


@pytest.mark.parametrize("name", ["", "a/b", "../x", "x" * 3000, "é\n\0", "CON", ".units"])
def test_any_name_can_be_a_units(tmp_path, name):
    units = Units(tmp_path)
    (tmp_path / "file").touch()
    units.finish(name, [tmp_path / "file"])
    assert Units(tmp_path).done(name)


def test_names_that_differ_in_case_are_two_units(out):
    units = Units(out)
    (out / "A.bin").write_text("other")
    units.finish("A", [out / "A.bin"])
    assert finished(out) == set(CONTENT) and Units(out).done("A")


def test_files_that_the_disk_takes_for_one_are_refused(out):
    """On a disk that does not tell upper from lower case both names lead to one file."""
    units = Units(out)
    os.link(out / "a.bin", out / "A.bin")
    with pytest.raises(UnsupportedError, match=r"a\.bin and A\.bin are one file on this disk"):
        units.finish("A", [out / "A.bin"])


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), OSError(errno.EFBIG, "limit"), KeyboardInterrupt()]
)
def test_an_entry_that_cannot_be_written_leaves_the_unit_undone(out, monkeypatch, error):
    def half(path, value):
        path.with_name(f".{path.name}.1").write_text("{")
        raise error

    units = Units(out)
    (out / "new.bin").touch()
    monkeypatch.setattr(module, "write_json", half)
    with pytest.raises(type(error)):
        units.finish("new", [out / "new.bin"])
    again = Units(out)
    assert not again.done("new") and not (out / "new.bin").exists()
    assert finished(out) == set(CONTENT)


def test_one_unit_is_finished_while_the_next_is_computed(tmp_path):
    units, order = Units(tmp_path), []
    finish, first_is_hashed = units.finish, threading.Event()

    def slow(name, parts, seconds):
        order.append(f"hash {name}")
        finish(name, parts, seconds)
        first_is_hashed.set()

    units.finish = slow

    def made():
        for item in "xyz":
            if item == "y":
                assert first_is_hashed.wait(5)
            (tmp_path / item).write_text(item)
            order.append(f"write {item}")
            yield item, [tmp_path / item]

    assert list(units.finishing(made())) == ["x", "y", "z"]
    assert [o for o in order if o[0] == "w"] == ["write x", "write y", "write z"]
    assert all(order.index(f"write {i}") < order.index(f"hash {i}") for i in "xyz")
    assert all(Units(tmp_path).done(i) for i in "xyz")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_in_the_loop_waits_for_the_last_unit_and_leaves_its_own_undone(tmp_path, error):
    units = Units(tmp_path)

    def made():
        for item in "xy":
            (tmp_path / item).write_bytes(bytes(10**7))
            if item == "y":
                raise error
            yield item, [tmp_path / item]

    with pytest.raises(error):
        list(units.finishing(made()))
    again = Units(tmp_path)
    assert again.done("x") and not again.done("y")
    assert not (tmp_path / "y").exists()


def test_an_error_in_finishing_stops_the_loop(tmp_path):
    with pytest.raises(FileNotFoundError, match="of the unit 'x'"):
        list(Units(tmp_path).finishing((name, [tmp_path / "absent"]) for name in "xyz"))


def test_the_published_folder_has_no_journal(store_root):
    with ArtifactStore(store_root).create("toy", {"made": "here"}, resume=True) as draft:
        fill(draft.data)
    assert sorted(draft.artifact.manifest["files"]) == sorted(files(draft.artifact.data))
    assert not (draft.artifact.data / JOURNAL).exists()
    draft.artifact.check()


def test_killed_while_it_is_published_a_run_finds_its_units(store_root, monkeypatch):
    """Inventory and sync of a large artifact take their time; nothing is lost there."""
    store = ArtifactStore(store_root)
    with monkeypatch.context() as patch:
        patch.setattr("dirotq.pipeline.store.sync_tree", lambda _: (_ for _ in ()).throw(KeyError))
        with pytest.raises(KeyError), store.create("toy", {"made": "here"}, resume=True) as draft:
            fill(draft.data)
    with store.create("toy", {"made": "here"}, resume=True) as draft:
        assert finished(draft.data) == set(CONTENT)
    draft.artifact.check()


def test_retiring_a_folder_without_a_journal(tmp_path):
    retire(tmp_path)
    assert tmp_path.exists()


@dataclass(frozen=True)
class Reads:
    """A stage that reads one file."""

    file: Path

    def identity(self) -> dict[str, str]:
        return {"text": self.file.read_text()}


def test_units_of_inputs_that_changed_never_count_even_if_those_come_back(tmp_path, monkeypatch):
    """As a kill would leave it: an entry waits until the inputs were looked at after its unit."""
    read, out = tmp_path / "weights", tmp_path / "out"
    read.write_text("right")
    out.mkdir()
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    units = Units(out, Reads(read))
    for name in "abcdefgh":  # 2 s each: a look every 5 s
        if name == "f":
            read.write_text("other")
        (out / name).write_text(read.read_text())
        try:
            units.finish(name, [out / name])
        except ArtifactError as error:
            assert "changed while they were read" in str(error)
            break
    else:
        raise AssertionError("nobody noticed")
    read.write_text("right")
    again = Units(out, Reads(read))
    kept = [name for name in "abcdefgh" if again.done(name)]
    assert 0 < len(kept) < 6
    assert all((out / name).read_text() == "right" for name in kept)
