import fcntl

import pytest

from dirotq.sources.placing import place


@pytest.fixture
def blob(tmp_path):
    file = tmp_path / "models--org--name" / "blobs" / ("0" * 64)
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    return file


def test_a_blob_is_linked_through_its_snapshot(blob, tmp_path):
    (tmp_path / "link").symlink_to(blob)
    place(tmp_path / "link", tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_ino == blob.stat().st_ino
    assert not (tmp_path / "copy").is_symlink()


def test_a_blob_on_another_file_system_is_copied(blob, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    place(blob, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"weights"
    assert (tmp_path / "copy").stat().st_ino != blob.stat().st_ino


@pytest.mark.parametrize("clones", [False, True])
def test_a_users_file_shares_nothing_with_its_copy(tmp_path, monkeypatch, clones):
    def ioctl(new, request, old):
        if not clones:
            raise OSError(95, "Operation not supported")
        new.write(b"weights")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"weights")
    (tmp_path / "link").symlink_to(mine)
    place(tmp_path / "link", tmp_path / "copy")
    mine.write_bytes(b"another")
    assert (tmp_path / "copy").read_bytes() == b"weights"
    assert (tmp_path / "copy").stat().st_ino != mine.stat().st_ino
