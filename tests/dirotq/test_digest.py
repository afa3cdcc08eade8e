import hashlib
import json
import os

import pytest

import dirotq.digest
from dirotq.digest import cache_root, file_digest, input_digests


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIROTQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dirotq.digest, "LARGE", 100)
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch):
    """Paths that were really read."""
    seen = []
    plain = dirotq.digest.file_digest

    def spy(path):
        seen.append(path)
        return plain(path)

    monkeypatch.setattr(dirotq.digest, "file_digest", spy)
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


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"PATH": 3}', '{"PATH": [1, 2, "no"]}'])
def test_a_damaged_memory_is_started_anew(tmp_path, cache, damage):
    big = large(tmp_path)
    cache.mkdir()
    (cache / "digests.json").write_text(damage.replace("PATH", str(big)))
    assert input_digests([big]) == {big: sha256(b"a" * 1000)}
    assert json.loads((cache / "digests.json").read_text())[str(big)][2] == sha256(b"a" * 1000)


def test_a_memory_that_can_not_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIROTQ_CACHE", str(tmp_path / "file" / "below"))
    big = large(tmp_path)
    assert input_digests([big]) == {big: sha256(b"a" * 1000)}


def test_a_blob_of_a_hub_cache_is_known_by_its_name(tmp_path, hashed):
    (tmp_path / "blobs").mkdir()
    blob, git_blob = (tmp_path / "blobs" / name for name in ("0a" * 32, "0a" * 20))
    link, git_link = tmp_path / "model.safetensors", tmp_path / "config.json"
    for target, place in ((blob, link), (git_blob, git_link)):
        target.write_text("content")
        place.symlink_to(target)
    assert input_digests([link, git_link]) == {link: "0a" * 32, git_link: sha256(b"content")}
    assert hashed == [git_link]


def test_the_cache_folder(monkeypatch, tmp_path):
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("DIROTQ_CACHE")
    assert cache_root().parts[-2:] == (".cache", "dirotq")
