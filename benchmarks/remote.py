"""What push and pull reach on a real S3 API on loopback, of which a share of answers fails.

usage: python benchmarks/remote.py [--bytes N] [--share 0.05] [--rounds 3]

Needs s3fs and moto[server] (`pip install 'dirotq[dev]'`). The raw rate is that of s3fs alone, its
``put`` and ``get`` of the same folder on a server that never fails. Ours is that of dirotq's push
and pull, digests included, on a server of which a third of the share is refused with 500, a third
cut in the middle of the answer and a third half a second late. Rounds take turns. At the end a push
is killed on its way, and the next one says what it did not send again.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from dirotq.errors import ArtifactError
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.remote import Remote
from dirotq.pipeline.remote_store import RemoteStore
from dirotq.pipeline.store import ArtifactStore

SUPPORT = Path(__file__).resolve().parents[1] / "tests" / "support"
SMALL, SMALL_FILES, LARGE_FILES = 400_000, 100, 8


@contextmanager
def server(share: float) -> Iterator[str]:
    """Start tests/support/s3_server.py in a process of its own; yields its address."""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(SUPPORT), *sys.path]))
    command = [sys.executable, "-m", "s3_server", "--share", str(share)]
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def made(root: Path, size: int) -> Artifact:
    """Publish an artifact of ``size`` bytes: eight large files, and a hundred small ones."""
    store = ArtifactStore(root)
    large = (size - SMALL * SMALL_FILES) // LARGE_FILES
    with store.create("pack", {"stage": {"bytes": size}, "inputs": {}}) as draft:
        for kind, count, each in (("large", LARGE_FILES, large), ("small", SMALL_FILES, SMALL)):
            (draft.data / kind).mkdir()
            for number in range(count):
                (draft.data / kind / f"{number}.bin").write_bytes(os.urandom(each))
    assert draft.artifact
    return draft.artifact


def at(address: str) -> Any:
    """Choose the server for what is opened next; its file system, with a bucket."""
    os.environ["AWS_ENDPOINT_URL"] = address
    fs = Remote("s3://bucket/x")._fs
    while True:
        try:
            fs.mkdir("bucket")
        except FileExistsError:
            return fs
        except OSError:
            continue


def raw(address: str, artifact: Artifact, number: int, root: Path) -> tuple[float, float]:
    """Seconds of s3fs's own put and get."""
    at(address)
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    near, far, back = str(artifact.data), f"bucket/raw{number}", root / "raw"
    put = seconds(lambda: fs.put(near, far, recursive=True))
    got = seconds(lambda: fs.get(far, str(back), recursive=True))
    fs.rm(far, recursive=True)
    shutil.rmtree(back)
    return put, got


def ours(address: str, artifact: Artifact, number: int, root: Path) -> tuple[float, float]:
    """Seconds of push and pull, as new processes take them: no digest is known before."""
    fs = at(address)
    url = f"s3://bucket/ours{number}"
    put = seconds(lambda: alone(_push, artifact, url))
    store = root / "ours"
    got = seconds(lambda: alone(_pull, artifact, url, store))
    ArtifactStore(store).verify(Artifact(*str(artifact).split("/"), path=store / str(artifact)))
    shutil.rmtree(store)
    while fs.exists(f"{url}/dirotq-remote.json"):
        try:
            fs.rm(url, recursive=True)
        except OSError:
            continue
    return put, got


def killed(address: str, artifact: Artifact, after: float) -> tuple[int, int]:
    """Kill a push after some seconds and push again: bytes sent then, bytes that had arrived."""
    at(address)
    url = "s3://bucket/killed"
    process = multiprocessing.get_context("spawn").Process(target=_push, args=(artifact, url))
    process.start()
    process.join(after)
    process.kill()
    process.join()
    moved = RemoteStore(url).push(artifact)
    if moved is None:
        raise ArtifactError("it had ended before it was killed")
    return moved.sent, moved.there


def alone(call: Callable[..., None], *args: Any) -> None:
    """Call in a new process, and wait for it."""
    process = multiprocessing.get_context("spawn").Process(target=call, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0


def _push(artifact: Artifact, url: str) -> None:
    RemoteStore(url).push(artifact)


def _pull(artifact: Artifact, url: str, store: Path) -> None:
    assert ArtifactStore(store, RemoteStore(url)).pull(artifact.stage, artifact.fingerprint)


def seconds(call: Callable[[], Any]) -> float:
    """Time one call."""
    began = time.monotonic()
    call()
    return time.monotonic() - began


def main() -> None:
    """Measure, and print a line per round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=1_000_000_000)
    parser.add_argument("--share", type=float, default=0.05, help="of answers that fail")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "x"}
    megabytes, rates = options.bytes / 1e6, []
    with (
        tempfile.TemporaryDirectory() as folder,
        server(0) as good,
        server(options.share) as bad,
    ):
        artifact = made(Path(folder, "near"), options.bytes)
        alone(str)  # what spawning a process takes is a part of neither
        for number in range(options.rounds):
            found = (
                *raw(good, artifact, number, Path(folder)),
                *ours(bad, artifact, number, Path(folder)),
            )
            rates.append([megabytes / s for s in found])
            print("MB/s: raw put {:.0f}, get {:.0f}; push {:.0f}, pull {:.0f}".format(*rates[-1]))
        raw_put, raw_get, push, pull = (statistics.median(column) for column in zip(*rates))
        print(f"median: push {push / raw_put:.0%} of the raw rate, pull {pull / raw_get:.0%}")
        sent, there = killed(bad, artifact, megabytes / push * 0.6)
        print(f"killed at 60 %: {there / 1e6:.0f} MB had arrived, {sent / 1e6:.0f} MB were sent")


if __name__ == "__main__":
    main()
