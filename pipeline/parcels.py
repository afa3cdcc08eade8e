"""Files with known digests, sent to a remote place and fetched from one: in parallel, resumed.

Beside a large file that arrived, ``<file>.dirotq-sent`` says so, and which file it was.
Neither a listing nor a service's own tag tells whether a file is the right one.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dirotq.pipeline.disk import files_below
from dirotq.pipeline.manifest import DamagedError
from dirotq.pipeline.remote import Remote
from dirotq.progress import track

THREADS = 8
HUGE = 100 << 20
"""Bytes of a file that is sent in parts at the same time. Few of these are under way together: what
is sent again after a kill is files that had not arrived."""
SENT = ".dirotq-sent"
LARGE = 256 << 10
"""Bytes from which a note costs less than sending the file twice, over most lines."""

Files = Mapping[str, Mapping[str, Any]]
"""{relative path: {sha256, bytes}}, as in a manifest."""


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes that were moved, and bytes of files that had arrived before."""

    sent: int
    there: int


def send(
    remote: Remote, place: str, files: Files, local: Callable[[str], Path], *, again: bool = False
) -> Moved:
    """Copy files to ``place``; those that arrived there before are passed over.

    local  gives the path of a file, its digest checked
    again  send all of them: what is there is damaged
    """

    few = threading.Semaphore(2)

    def one(name: str) -> int:
        with few if files[name]["bytes"] >= HUGE else contextlib.nullcontext():
            return send_one(name)

    def send_one(name: str) -> int:
        wanted = files[name]
        path, there, note = local(name), _at(place, name), _at(place, name + SENT)
        if wanted["bytes"] < LARGE:
            remote.send(path, there)
            return int(wanted["bytes"])
        if (found := remote.read(note)) is not None:
            arrived = _says(found, wanted) and remote.size(there) == wanted["bytes"]
            if arrived and not again:
                return 0
            remote.remove(note)  # what it speaks of is about to be replaced
        remote.send(path, there)
        remote.write(note, json.dumps(dict(wanted)).encode())
        return int(wanted["bytes"])

    return _moved(one, files, "sending")


def settle(remote: Remote, place: str, files: Files) -> None:
    """Remove the notes of ``send``, once all has arrived and something says so."""
    noted = [_at(place, name + SENT) for name, entry in files.items() if entry["bytes"] >= LARGE]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(remote.tidy, noted))


def fetch(remote: Remote, place: str, files: Files, folder: Path) -> Moved:
    """Copy files from ``place`` into ``folder``, and remove all others from it.

    What an interrupted fetch left there is used. Raises DamagedError for a file that is not what
    ``files`` says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in files_below(folder):
        if path.is_symlink() or path.relative_to(folder).as_posix() not in files:
            path.unlink()

    def one(name: str) -> int:
        wanted, path, there = files[name], folder / name, _at(place, name)
        before = path.stat().st_size if path.exists() else 0
        if before > wanted["bytes"]:
            path.unlink()
            before = 0
        found = remote.fetch(there, path, wanted["bytes"])
        if found != wanted["sha256"] and before:  # the beginning was of something else
            path.unlink()
            before, found = 0, remote.fetch(there, path, wanted["bytes"])
        if found != wanted["sha256"]:
            size = path.stat().st_size
            path.unlink()
            what = f"{size} bytes with the sha256 {found:.12}..." if found else "no such object"
            raise DamagedError(
                f"{remote}/{there} is damaged: there is {what}, and {wanted['bytes']} bytes with "
                f"{wanted['sha256']:.12}... were sent. `dirotq push --force` from a machine that "
                "has it whole mends it"
            )
        return int(wanted["bytes"]) - before

    return _moved(one, files, "fetching")


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Write a manifest, or any object, as the local store does."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _moved(one: Callable[[str], int], files: Files, does: str) -> Moved:
    names = sorted(files, key=lambda name: -files[name]["bytes"])  # so that none begins late
    total = sum(entry["bytes"] for entry in files.values())
    sent = sum(_in_threads(one, names, does))
    return Moved(sent, total - sent)


def _in_threads(one: Callable[[str], int], names: Iterable[str], does: str) -> list[int]:
    """Call ``one`` with each name; the first error ends it, once what is under way has ended."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(one, name) for name in names]
        try:
            return [f.result() for f in track(as_completed(futures), does, total=len(futures))]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _at(place: str, name: str) -> str:
    return f"{place}/{name}" if place else name


def _says(note: bytes, wanted: Mapping[str, Any]) -> bool:
    try:
        return bool(json.loads(note) == dict(wanted))
    except ValueError:
        return False
