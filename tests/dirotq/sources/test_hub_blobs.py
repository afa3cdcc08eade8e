import hashlib
import json

import pytest
from huggingface_hub import constants

from dirotq.errors import ConfigError
from dirotq.sources.hub import HubPath, is_blob, unproven

COMMIT = "a" * 40


def git(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DIROTQ_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "models--org--name"
    for part in ("blobs", f"snapshots/{COMMIT}", "trees"):
        (folder / part).mkdir(parents=True)
    return folder


@pytest.fixture
def root(home):
    """A snapshot of a large and a small file."""
    folder = home / "snapshots" / COMMIT
    for name, content, named in (("w", b"weights", sha256), ("c", b"{}", git)):
        (home / "blobs" / named(content)).write_bytes(content)
        (folder / name).symlink_to(f"../../blobs/{named(content)}")
    return folder


def test_what_a_blob_is(home):
    assert is_blob(home / "blobs" / ("0" * 64))
    assert is_blob(home / "blobs" / ("0" * 40))
    assert not is_blob(home / "blobs" / ("0" * 64 + ".incomplete"))
    assert not is_blob(home / "blobs" / "model.safetensors")
    assert not is_blob(home.parent / "blobs" / ("0" * 64))
    assert not is_blob(home / "snapshots" / ("0" * 40))


def test_intact_blobs_are_proven_by_their_names(root):
    assert unproven(root, [root / "w", root / "c"], {}) == []


@pytest.mark.parametrize(("name", "content"), [("w", b"weightz"), ("c", b"[]"), ("c", b"{} ")])
@pytest.mark.parametrize("listed", [False, True])
def test_a_damaged_blob_is_named(root, name, content, listed):
    ids = {"w": sha256(b"weights"), "c": git(b"{}")} if listed else {}
    (root / name).write_bytes(content)
    blob = (root / name).resolve()
    with pytest.raises(
        ConfigError, match=rf"cached download .*/{name} is damaged.*Delete .*{blob}"
    ):
        unproven(root, [root / "w", root / "c"], ids)


def test_a_plain_file_is_proven_by_the_list_only(root):
    """`sed -i` puts a file in the link's place; Windows has no links."""
    (root / "c").unlink()
    (root / "c").write_bytes(b"{}")
    assert unproven(root, [root / "w", root / "c"], {}) == [root / "c"]
    assert unproven(root, [root / "c"], {"c": git(b"{}")}) == []
    (root / "c").write_bytes(b"{ }")
    with pytest.raises(ConfigError, match="or was edited"):
        unproven(root, [root / "c"], {"c": git(b"{}")})


def test_a_link_to_another_blob_is_seen_with_the_list_only(root, home):
    other = b"other weights"
    (home / "blobs" / sha256(other)).write_bytes(other)
    (root / "w").unlink()
    (root / "w").symlink_to(home / "blobs" / sha256(other))
    assert unproven(root, [root / "w"], {}) == []
    with pytest.raises(ConfigError, match=r"Delete .*/w and .*/blobs/"):
        unproven(root, [root / "w"], {"w": sha256(b"weights")})


def test_the_list_of_a_commit(home, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home.parent))
    place = HubPath("org/name", None, COMMIT, "model")
    assert place.listing() == {}
    file = home / "trees" / f"{COMMIT}.json"
    small, large = {"size": 2, "blob_id": "0" * 40}, {"size": 9, "blob_id": "1" * 40}
    files = {"a": small, "b/c": large | {"lfs_sha256": "2" * 64, "lfs_size": 99}}
    file.write_text(json.dumps({"format_version": 1, "files": files}))
    assert place.listing() == {"a": "0" * 40, "b/c": "2" * 64}
    for files in ("3", '{"a": {}}', '{"a": {"blob_id": 1}}', '{"a": 1}'):
        file.write_text(f'{{"files": {files}}}')
        assert place.listing() == {}, files
    for damage in ("", "{", "[]"):
        file.write_text(damage)
        assert place.listing() == {}, damage
