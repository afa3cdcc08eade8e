import hashlib
import json
import os
import time
from pathlib import Path

import pytest

import dirotq.files.digest
from dirotq.errors import ConfigError
from dirotq.files.digest import cache_root, content_digest, file_digest, input_digests


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIROTQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dirotq.files.digest, "LARGE", 100)
    monkeypatch.setattr(dirotq.files.digest, "TICK", 0)
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch):
    """Paths that were really read."""
    seen = []
    plain = dirotq.files.digest.file_digest

    def spy(path):
        seen.append(path)
        return plain(path)

    monkeypatch.setattr(dirotq.files.digest, "file_digest", spy)
    return seen


def large(folder, name="x", fill=b"a"):
    file = folder / name
    file.write_bytes(fill * 1000)
    return file


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_is_the_sha256_of_the_content(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"abc" * 100_000)
    assert file_digest(file) == sha256(b"abc" * 100_000)


def test_a_change_of_the_same_size_is_seen(tmp_path):
    file = tmp_path / "x"
    file.write_text("before")
    os.utime(file, ns=(1, 1))
    first = file_digest(file)
    file.write_text("after!")
    assert file_digest(file) != first


def test_many_files_at_once(tmp_path):
    files = [large(tmp_path, f"f{i}", bytes([i])) for i in range(20)]
    assert input_digests(files) == {f: sha256(bytes([i]) * 1000) for i, f in enumerate(files)}


def test_large_files_are_hashed_once_and_remembered(tmp_path, cache, hashed):
    big, small = large(tmp_path), tmp_path / "small"
    small.write_text("s")
    first = input_digests([big, small])
    assert input_digests([big, small]) == first
    assert hashed == [big, small, small]
    assert list(json.loads((cache / "digests.json").read_text())) == [str(big.resolve())]
    assert [p.name for p in cache.iterdir() if p.name.startswith(".")] == []


def test_a_changed_file_is_hashed_again(tmp_path, hashed):
    big = large(tmp_path)
    before = input_digests([big])[big]
    large(tmp_path, fill=b"b")
    os.utime(big, ns=(5, 5))
    assert input_digests([big])[big] == sha256(b"b" * 1000) != before
    assert hashed == [big, big]


@pytest.mark.parametrize("size", [10, 1000])
def test_a_copy_that_keeps_size_and_time_is_seen(tmp_path, size):
    """`cp -p OTHER FILE`: the change time is the file system's own."""
    file = tmp_path / "x"
    file.write_bytes(b"a" * size)
    os.utime(file, ns=(5, 5))
    assert input_digests([file]) == {file: sha256(b"a" * size)}
    time.sleep(0.02)  # the change time ticks a hundred times a second, or more often
    file.write_bytes(b"b" * size)
    os.utime(file, ns=(5, 5))
    assert file_digest(file) == sha256(b"b" * size)
    assert input_digests([file]) == {file: sha256(b"b" * size)}


def test_a_link_that_leads_elsewhere_is_seen(tmp_path):
    link = tmp_path / "link"
    for name, fill in (("one", b"a"), ("two", b"b")):
        target = large(tmp_path, name, fill)
        os.utime(target, ns=(5, 5))
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert file_digest(link) == input_digests([link])[link] == sha256(fill * 1000)


def test_what_changed_a_moment_ago_is_not_remembered(tmp_path, cache, hashed, monkeypatch):
    """Two writes within a tick of the clock bear the same times."""
    monkeypatch.setattr(dirotq.files.digest, "TICK", 10**12)
    times = iter([b"a", b"b"])
    big = tmp_path / "x"
    for fill in times:
        big.write_bytes(fill * 1000)
        assert input_digests([big])[big] == sha256(fill * 1000)
    assert not (cache / "digests.json").exists()


DAMAGE = ["", "{", "[1]", '{"PATH": 3}', '{"PATH": [1, 2, "no"]}', "[" * 10**5, "\x00",
          '{"PATH": [1000, MTIME, CTIME, INODE, "no"]}']  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_memory_is_started_anew(tmp_path, cache, damage):
    big = large(tmp_path)
    cache.mkdir()
    (cache / "digests.json").write_text(filled(damage, big))
    assert input_digests([big]) == {big: sha256(b"a" * 1000)}
    assert json.loads((cache / "digests.json").read_text())[str(big)][-1] == sha256(b"a" * 1000)


def filled(text, file):
    stat = file.stat()
    known = {"PATH": file, "MTIME": stat.st_mtime_ns, "CTIME": stat.st_ctime_ns,
             "INODE": stat.st_ino}  # fmt: skip
    for name, value in known.items():
        text = text.replace(name, str(value))
    return text


def test_entries_of_older_versions_count_for_nothing(tmp_path, cache):
    """They knew size and modification time only. The same entry with all four is believed."""
    big = large(tmp_path)
    cache.mkdir()
    lie = "0" * 64
    (cache / "digests.json").write_text(filled(f'{{"PATH": [1000, MTIME, "{lie}"]}}', big))
    assert input_digests([big]) == {big: sha256(b"a" * 1000)}
    told = f'{{"PATH": [1000, MTIME, CTIME, INODE, "{lie}"]}}'
    (cache / "digests.json").write_text(filled(told, big))
    assert input_digests([big]) == {big: lie}


def test_a_memory_that_is_a_pipe_does_not_hang(tmp_path, cache):
    cache.mkdir()
    os.mkfifo(cache / "digests.json")
    big = large(tmp_path)
    assert input_digests([big]) == {big: sha256(b"a" * 1000)}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_memory_has_the_mode_of_other_files(tmp_path, cache, umask, mode):
    before = os.umask(umask)
    try:
        input_digests([large(tmp_path)])
    finally:
        os.umask(before)
    assert (cache / "digests.json").stat().st_mode & 0o777 == mode
    assert [p.name for p in cache.iterdir() if p.name.startswith(".")] == []


def test_a_memory_that_can_not_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIROTQ_CACHE", str(tmp_path / "file" / "below"))
    big = large(tmp_path)
    assert input_digests([big]) == {big: sha256(b"a" * 1000)}


def test_git_names_a_file_by_its_length_and_content(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"hello\n")  # `echo hello | git hash-object --stdin`
    assert content_digest(file, "git") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_the_cache_folder(monkeypatch, tmp_path):
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("DIROTQ_CACHE")
    assert cache_root().parts[-2:] == (".cache", "dirotq")


def test_a_user_without_a_home_needs_no_memory(monkeypatch, tmp_path):
    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DIROTQ_CACHE")
    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(ConfigError, match=r"Could not determine home.*DIROTQ_CACHE"):
        cache_root()
    big = large(tmp_path)
    assert input_digests([big]) == {big: sha256(b"a" * 1000)}
