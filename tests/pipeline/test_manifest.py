import contextlib
import copy
import json
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirotq.errors import ArtifactError
from dirotq.pipeline.manifest import DamagedError, inventory, read_json, read_manifest, sealed

GOOD = {
    "schema": 1,
    "stage": "toy",
    "fingerprint": "0123456789abcdef",
    "recipe": {"stage": {}, "inputs": {}},
    "files": {"tree/one": {"sha256": "0" * 64, "bytes": 3}},
    "metrics": {"psnr": 40.0, "worst": "inf", "count": 3},
}


def written(folder, content):
    path = folder / "manifest.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_good_one(tmp_path):
    assert read_manifest(written(tmp_path, GOOD)) == GOOD


def files(name, **entry):
    return GOOD | {"files": {name: {"sha256": "0" * 64, "bytes": 3} | entry}}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no valid JSON"),
        ("{", "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"recipe": NaN}', "NaN is no JSON"),
        ({}, "schema is None"),
        (GOOD | {"schema": "1"}, "schema is '1'"),
        (GOOD | {"schema": 0}, "schema is 0"),
        (GOOD | {"schema": True}, "schema is True"),
        ({k: v for k, v in GOOD.items() if k != "recipe"}, "recipe is None, not a dict"),
        (GOOD | {"files": []}, r"files is \[\], not a dict"),
        (GOOD | {"metrics": "many"}, "metrics is 'many'"),
        (GOOD | {"metrics": {"psnr": None}}, "metric 'psnr' is None, not a number"),
        (GOOD | {"metrics": {"psnr": 10**400}}, "metric 'psnr'"),
        (GOOD | {"metrics": {"psnr": True}}, "metric 'psnr'"),
        (files("../../ext"), r"'../../ext', which is not a path below data/"),
        (files("/etc/passwd"), "'/etc/passwd', which is not a path"),
        (files("a/../../b"), "not a path below data/"),
        (files("a\0b"), "not a path below data/"),
        (files(""), "not a path below data/"),
        (files("."), "not a path below data/"),
        (files("a//b"), "not a path below data/"),
        (files("\ud800"), "not a path below data/"),
        (files("ok", bytes="3"), "not a sha256 and bytes"),
        (files("ok", bytes=-1), "not a sha256 and bytes"),
        (files("ok", bytes=True), "not a sha256 and bytes"),
        (files("ok", sha256="0" * 63), "not a sha256 and bytes"),
        (GOOD | {"files": {"ok": None}}, "not a sha256 and bytes"),
    ],
)
def test_odd_shapes_are_damage(tmp_path, content, says):
    with pytest.raises(DamagedError, match=says):
        read_manifest(written(tmp_path, content))


def test_a_newer_one_is_no_damage(tmp_path):
    with pytest.raises(ArtifactError, match="a newer version wrote it") as caught:
        read_manifest(written(tmp_path, {"schema": 2, "anything": "else"}))
    assert not isinstance(caught.value, DamagedError)  # and is never removed


def link(path):
    path.symlink_to(written(path.parent, GOOD).replace(path.with_name("elsewhere")))


def bound(path):
    os.chdir(path.parent)  # a socket's path may have 108 letters
    socket.socket(socket.AF_UNIX).bind(path.name)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (os.mkfifo, "is a named pipe, not a file"),
        (lambda path: path.mkdir(), "is a folder, not a file"),
        (link, "is a symbolic link, not a file"),
        (bound, "is a socket, not a file"),
        (lambda path: None, "does not exist"),
    ],
)
def test_what_is_no_file_is_never_opened(tmp_path, monkeypatch, make, says):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "manifest.json")
    with pytest.raises(DamagedError, match=says):
        read_manifest(tmp_path / "manifest.json")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_no_other_error_for_any_json(tmp_path_factory, data):
    content = copy.deepcopy(GOOD)
    place = content
    for key in data.draw(
        st.sampled_from([("files",), ("files", "tree/one"), ("files", "x"), ("metrics", "x"), ()])
    ):
        parent, place = place, place.get(key)
        last = key
    if place is content:
        content[data.draw(st.sampled_from(list(GOOD)))] = data.draw(anything)
    else:
        parent[last] = data.draw(anything)
    path = written(tmp_path_factory.getbasetemp(), content)
    try:
        read = read_manifest(path)
    except ArtifactError:
        return
    assert all(float(value) is not None for value in read["metrics"].values())
    assert all(entry["bytes"] >= 0 for entry in read["files"].values())


@given(st.binary(max_size=60))
def test_no_other_error_for_any_bytes(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    path.write_bytes(content)
    try:
        assert isinstance(read_json(path), dict)
    except DamagedError as error:
        assert "bytes.json" in str(error)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/etc/hostname")])
def test_only_files_are_published(tmp_path, make):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "one").write_text("1")
    assert list(inventory(tmp_path)) == ["sub/one"]
    make(tmp_path / "sub" / "two")
    with pytest.raises(ArtifactError, match=r"two is a .*only files can be published"):
        inventory(tmp_path)


def test_a_manifest_of_an_older_version_has_no_digest_and_is_read(tmp_path):
    assert "digest" not in GOOD
    assert read_manifest(written(tmp_path, GOOD)) == GOOD


@pytest.mark.parametrize("key", ["recipe", "files", "metrics", "stage"])
def test_what_a_sealed_manifest_says_can_not_be_changed(tmp_path, key):
    content = sealed(GOOD)
    assert read_manifest(written(tmp_path, content)) == content
    other = content[key] + "x" if isinstance(content[key], str) else {}
    with pytest.raises(DamagedError, match="its digest differs"):
        read_manifest(written(tmp_path, content | {key: other}))


def test_a_digest_under_another_name_is_noticed(tmp_path):
    content = sealed(GOOD)
    content["dhgest"] = content.pop("digest")
    with pytest.raises(DamagedError, match="dhgest"):
        read_manifest(written(tmp_path, content))


def test_every_flipped_bit_of_a_published_manifest_is_noticed_or_changes_nothing(store):
    with store.create("numbers", {"stage": {"x": 1}}) as draft:
        (draft.data / "a").write_text("1")
        draft.metrics.update(loss=0.25)
    file = draft.artifact.path / "manifest.json"
    written_bytes, want = file.read_bytes(), read_manifest(file)
    for place in range(len(written_bytes)):
        changed = bytearray(written_bytes)
        changed[place] ^= 1 << (place % 8)
        file.write_bytes(changed)
        with contextlib.suppress(DamagedError):
            assert read_manifest(file) == want
