import hashlib
import os

from dirotq.digest import file_digest


def test_is_the_sha256_of_the_content(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"abc" * 100_000)
    assert file_digest(file) == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_change_of_the_same_size_is_seen(tmp_path):
    file = tmp_path / "x"
    file.write_text("before")
    os.utime(file, ns=(1, 1))
    first = file_digest(file)
    file.write_text("after!")
    assert file_digest(file) != first
