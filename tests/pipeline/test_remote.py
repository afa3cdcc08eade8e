"""One place on an fsspec URL: whole objects, attempts, and what is said when they fail."""

import copy
import errno
import hashlib
import re
import sys

import pytest
from faulty_files import faulty as faulty

from dirotq.errors import ArtifactError, ConfigError
from dirotq.pipeline import remote
from dirotq.pipeline.remote import ATTEMPTS, Remote
from dirotq.pipeline.remote_errors import explained, lasting

DATA = bytes(range(256)) * 40
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(params=["file", "memory", "faulty"])
def place(request, faulty, tmp_path):
    return Remote(f"{request.param}://{tmp_path}/far")


def test_objects_there_and_back(place, tmp_path):
    (tmp_path / "near").write_bytes(DATA)
    place.send(tmp_path / "near", "a/b")
    place.write("a/c", b"small")
    assert place.read("a/c") == b"small"
    assert place.size("a/b") == len(DATA)
    assert place.names("a") == ["b", "c"]
    assert place.fetch("a/b", tmp_path / "back", len(DATA)) == DIGEST
    assert (tmp_path / "back").read_bytes() == DATA
    place.remove("a/b")
    place.remove("a/b")
    assert place.size("a/b") is None


def test_what_is_not_there(place, tmp_path):
    assert place.read("nix") is None
    assert place.size("nix") is None
    assert place.names("nix") == []
    assert place.fetch("nix", tmp_path / "back", 7) is None
    place.remove("nix")
    place.tidy("nix")


@pytest.mark.parametrize("has", [0, 1, 4096, len(DATA)])
def test_a_fetch_goes_on_where_the_last_one_ended(has, faulty, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 1024)
    place = Remote("faulty://far")
    place.write("x", DATA)
    (tmp_path / "back").write_bytes(DATA[:has])
    assert place.fetch("x", tmp_path / "back", len(DATA)) == DIGEST
    assert faulty.asked.get("get", 0) == -((has - len(DATA)) // 1024)


def test_a_shorter_object_ends(faulty, tmp_path):
    place = Remote("faulty://far")
    place.write("x", DATA[:100])
    assert place.fetch("x", tmp_path / "back", len(DATA)) != DIGEST
    assert (tmp_path / "back").stat().st_size == 100


def test_a_file_gets_its_name_when_it_is_whole(tmp_path, monkeypatch):
    place = Remote(f"file://{tmp_path}/far")
    place.write("x", b"old")
    seen = []

    def put(path, data):
        (tmp_path / "far" / path.rpartition("/")[2]).write_bytes(data[:2])
        seen.append(place.read("x"))
        raise PermissionError("cut")

    monkeypatch.setattr(place._fs, "pipe_file", put)
    with pytest.raises(ArtifactError, match="may not be written"):
        place.write("x", b"new")
    assert seen == [b"old"]
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["x"]


def test_what_passes_by_itself_is_tried_again(faulty):
    place, faulty.share = Remote("faulty://far"), 0.3
    for number in range(40):
        place.write(str(number), DATA)
    assert all(place.read(str(number)) == DATA for number in range(40))
    assert faulty.failed > 10


def test_attempts_end_and_say_what_failed(faulty):
    place, faulty.share = Remote("faulty://far"), 1
    with pytest.raises(ArtifactError, match=rf"faulty://far/x could not be read after {ATTEMPTS} "):
        place.read("x")
    assert faulty.asked == {"get": ATTEMPTS}


@pytest.mark.parametrize(
    "error",
    [
        PermissionError("AccessDenied"),
        NotImplementedError(),
        ValueError("Invalid bucket name"),
        OSError(errno.ENOSPC, "No space left on device"),
        type("NoCredentialsError", (Exception,), {})("Unable to locate credentials"),
        FileNotFoundError("The specified bucket does not exist"),
    ],
)
def test_what_lasts_is_asked_once(error, faulty, monkeypatch):
    place, asked = Remote("faulty://far"), []

    def cat_file(*args, **kwargs):
        asked.append(args)
        raise error

    monkeypatch.setattr(place._fs, "cat_file", cat_file)
    with pytest.raises(ArtifactError, match=r"^faulty://far/x") as raised:
        place.read("x")
    assert len(asked) == 1
    assert "attempts" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (type("NoCredentialsError", (Exception,), {})("x"), "no credentials for s3://mine.*AWS_AC"),
        (FileNotFoundError("The specified bucket does not exist"), "there is no bucket s3://mine"),
        (PermissionError("Access Denied"), "may not be written: PermissionError: Access Denied"),
        (OSError(errno.ENOSPC, "No space"), "the disk there is full"),
        (ConnectionError("to http://me:secret@host"), "ConnectionError: to http://host. Check"),
        (RuntimeError(), "RuntimeError. Check"),
    ],
)
def test_every_failure_is_a_sentence(error, says):
    text = str(explained(error, "written", "s3://mine/store/x", 1))
    assert re.search(says, text)
    assert "secret" not in text


def test_other_errors_do_not_last():
    passing = [OSError(121, "500"), TimeoutError(), ConnectionError(), RuntimeError("closed")]
    assert not any(map(lasting, passing))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("/tmp/store", "is no URL of a remote store"),
        ("s3://", "is no URL of a remote store"),
        ("nix://there/x", "fsspec knows no protocol nix://"),
    ],
)
def test_urls_that_are_none(url, says):
    with pytest.raises(ArtifactError, match=says):
        Remote(url)


@pytest.mark.parametrize(("url", "package"), [("s3://b/x", r"dirotq\[s3\]"), ("gs://b/x", "gcsfs")])
def test_a_package_that_is_missing_is_named(url, package, monkeypatch):
    for name in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url[:2], raising=False)
    with pytest.raises(ArtifactError, match=package):
        Remote(url)


def test_a_url_with_a_password_is_refused_and_not_repeated():
    with pytest.raises(ConfigError) as raised:
        Remote("s3://me:hunter2@bucket/x")
    assert "hunter2" not in str(raised.value)


def test_a_place_goes_to_other_processes_by_its_url(faulty):
    place = copy.deepcopy(Remote("faulty://far/"))  # as pickle does
    assert place.url == "faulty://far"
    assert place.read("x") is None
