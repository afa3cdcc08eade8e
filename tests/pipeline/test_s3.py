"""A real S3 API on loopback: nothing of fsspec is replaced, and the server fails to order."""

import hashlib
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_artifact import RECIPE, publish

from dirotq.errors import ArtifactError
from dirotq.pipeline import parcels
from dirotq.pipeline import remote as remote_module
from dirotq.pipeline.remote import Remote
from dirotq.pipeline.remote_store import RemoteStore
from dirotq.pipeline.stage import fingerprint
from dirotq.pipeline.store import ArtifactStore

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
from s3_server import serving

URL = "s3://bucket/some/store"
KEY = fingerprint(RECIPE)


@pytest.fixture(scope="module")
def server():
    with serving() as (address, bad):
        yield address, bad


@pytest.fixture(autouse=True)
def bad(server, monkeypatch, tmp_path):
    """The server's faults; credentials and an empty bucket."""
    address, bad = server
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    fs = Remote("s3://bucket/x")._fs
    if fs.exists("bucket"):
        fs.rm("bucket", recursive=True)
    fs.mkdir("bucket")
    yield bad
    bad.share = 0


def made(folder, sizes):
    choose = random.Random(0)
    files = {}
    for number, size in enumerate(sizes):
        data = choose.randbytes(size)
        path = folder / "deep" / f"{number}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": size}
        files[f"deep/{number}.bin"] = entry
    return files


def test_an_artifact_there_and_back(store, tmp_path):
    artifact, remote = publish(store), RemoteStore(URL)
    assert remote.manifest("toy", KEY) is None
    remote.push(artifact)
    assert RemoteStore(URL).push(artifact) is None
    assert remote.find("toy") == ("toy", KEY)
    assert not [name for name in remote.remote._fs.find("bucket") if name.endswith(parcels.SENT)]
    other = ArtifactStore(tmp_path / "b", RemoteStore(URL))
    other.verify(other.pull("toy", KEY))


def test_files_arrive_through_500s_cuts_and_silence(bad, tmp_path, monkeypatch):
    """Every fourth request goes wrong; one file has several parts."""
    monkeypatch.setattr(remote_module, "PAUSE", 0.01)
    monkeypatch.setattr(remote_module, "PIECE", 1 << 20)
    monkeypatch.setattr(remote_module, "ATTEMPTS", 20)
    files = made(tmp_path / "near", [0, 10, 1000, 70_000, 2 << 20, 3 << 20, 5 << 20])
    place = Remote(URL)
    bad.share, bad.pause, bad.failed = 0.25, 0.05, 0
    bad.choose.seed(1)
    parcels.send(place, "x", files, lambda name: tmp_path / "near" / name)
    parcels.fetch(place, "x", files, tmp_path / "back")
    assert bad.failed > 5
    for name in files:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "near" / name).read_bytes()


def test_a_killed_push_goes_on(server, tmp_path):
    """The process is killed while it sends; the next one sends the rest."""
    files = made(tmp_path / "near", [2 << 20] * 30)
    script = f"""
from pathlib import Path
from dirotq.pipeline import parcels
from dirotq.pipeline.remote import Remote
parcels.THREADS = 2
near = Path({str(tmp_path / "near")!r})
parcels.send(Remote({URL!r}), "x", {files!r}, lambda name: near / name)
"""
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root), *sys.path])
    env = dict(os.environ, PYTHONPATH=paths)
    process = subprocess.Popen([sys.executable, "-c", script], env=env)
    is_note = re.compile(re.escape(parcels.SENT)).search
    place, deadline = Remote(URL), time.monotonic() + 60
    while not any(map(is_note, place.names("x/deep"))) and time.monotonic() < deadline:
        place._fs.invalidate_cache()
        assert process.poll() is None, "it ended before it was killed"
    process.kill()
    process.wait()
    moved = parcels.send(place, "x", files, lambda name: tmp_path / "near" / name)
    assert 0 < moved.there < 60 << 20
    parcels.fetch(place, "x", files, tmp_path / "back")


def test_no_bucket():
    for name in ("read", "push"):
        with pytest.raises(ArtifactError, match=r"there is no bucket s3://missing. Create it"):
            if name == "read":
                RemoteStore("s3://missing/x")
            else:
                Remote("s3://missing/x").write("a", b"a")


def test_no_credentials(monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ArtifactError, match=r"no credentials for s3://bucket.*AWS_ACCESS_KEY_ID"):
        RemoteStore(URL)


def test_no_server(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(remote_module, "ATTEMPTS", 1)
    with pytest.raises(ArtifactError, match=r"could not be read: .*127\.0\.0\.1:9.*AWS_ENDPOINT"):
        RemoteStore(URL)
