"""Power loss: what the disk may hold if it stops between two operations, and the same command then.

One run of the line is recorded: after each of its operations on files, what changed below the store
(names, and contents by inode), and each fsync. A loss at operation k then leaves a disk that kept
its promises and nothing else:

* a folder's names are those of some moment between its last fsync and k;
* a file's content is that of its last fsync, or anything written after it: nothing, a beginning,
  zeros of the right length, or all of it.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from .kills import count_operations
from .world import Counts, World, forked

TICK = 50_000_000
"""Nanoseconds within which a file system may give two writes one time."""

Names = dict[str, tuple[int, bool]]
"""Of one folder: {name: (inode, whether it is a folder)}."""


@dataclass(slots=True)
class Recording:
    """``folders`` {inode: [(operation, names)]}, ``files`` {inode: [(operation, blob)]}, each in
    order; ``synced`` {inode: [operation]}; ``blobs`` the folder of contents."""

    blobs: Path
    root: int = 0
    operations: int = 0
    folders: dict[int, list[tuple[int, Names]]] = field(default_factory=dict)
    files: dict[int, list[tuple[int, str]]] = field(default_factory=dict)
    synced: dict[int, list[int]] = field(default_factory=dict)


def power_loss(world: World, count: int, random: Random) -> Counts:
    """From every disk that a loss may leave, the same command ends with the same bytes."""
    counts = Counts("power loss, rerun")
    recording = _recorded(world)
    for number in range(count):
        # Evenly over the run, so that all stages are met.
        at = (number * recording.operations + random.randint(0, recording.operations)) // count
        store = world.folder("power") / "store"
        _lay_out(recording, at, store, random)
        problem = world.differences(store, until="")
        if problem is None:
            ended = world.compress(store)
            problem = None if ended.how == "done" else f"{ended.how}: {ended.said}"
        problem = problem or world.differences(store)
        counts.count(problem and f"loss at {at} of {recording.operations}: {problem}")
        shutil.rmtree(store.parent)
    return counts


def _recorded(world: World) -> Recording:
    folder = world.folder("recording")
    store, blobs = folder / "store", folder / "blobs"
    blobs.mkdir()
    store.mkdir()

    def job() -> dict[str, Any]:
        from tiny_line import run

        recording = Recording(blobs, root=store.stat().st_ino)
        seen: dict[int, tuple[int, int]] = {}
        plain_fsync, one_at_a_time, looking = os.fsync, threading.Lock(), threading.local()

        def look(event: str = "", path: str = "") -> None:
            if getattr(looking, "now", False):
                return  # our own reading
            with one_at_a_time:
                looking.now = True
                recording.operations += 1
                _look(store, recording, seen)
                looking.now = False

        def fsync(handle: int) -> None:
            plain_fsync(handle)
            look()
            recording.synced.setdefault(os.fstat(handle).st_ino, []).append(recording.operations)

        os.fsync = fsync
        count_operations(store, look)
        run(world.line(store))
        look()
        return {
            "root": recording.root,
            "operations": recording.operations,
            "folders": list(recording.folders.items()),
            "files": list(recording.files.items()),
            "synced": list(recording.synced.items()),
        }

    def to_file() -> None:
        (folder / "recording.json").write_text(json.dumps(job()))

    ended = forked(to_file)
    if ended.how != "done":
        raise RuntimeError(f"the recorded run failed: {ended}")
    found = json.loads((folder / "recording.json").read_text())
    pairs = {name: dict(map(tuple, found[name])) for name in ("folders", "files", "synced")}
    return Recording(blobs, root=found["root"], operations=found["operations"], **pairs)


def _look(store: Path, recording: Recording, seen: dict[int, tuple[int, int]]) -> None:
    """Note what changed below the store since the last look."""
    now = recording.operations
    waiting = [(recording.root, str(store))]
    while waiting:
        inode, folder = waiting.pop()
        try:
            entries = list(os.scandir(folder))
        except FileNotFoundError:
            continue  # another thread just removed it
        names: Names = {}
        for entry in entries:
            try:
                stat = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            is_folder = entry.is_dir(follow_symlinks=False)
            names[entry.name] = (stat.st_ino, is_folder)
            if is_folder:
                waiting.append((stat.st_ino, entry.path))
            elif (
                seen.get(stat.st_ino) != (stat.st_size, stat.st_mtime_ns)
                or time.time_ns() - stat.st_mtime_ns < TICK
            ):
                seen[stat.st_ino] = (stat.st_size, stat.st_mtime_ns)
                _keep(recording, stat.st_ino, entry.path)
        history = recording.folders.setdefault(inode, [])
        if not history or history[-1][1] != names:
            history.append((now, names))


def _keep(recording: Recording, inode: int, path: str) -> None:
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return
    blob = hashlib.sha256(content).hexdigest()
    if not (place := recording.blobs / blob).exists():
        place.write_bytes(content)
    history = recording.files.setdefault(inode, [])
    if not history or history[-1][1] != blob:
        history.append((recording.operations, blob))


def _lay_out(recording: Recording, at: int, store: Path, random: Random) -> None:
    """Write a disk that a loss at operation ``at`` may leave."""
    store.mkdir()
    waiting = [(recording.root, store)]
    while waiting:
        inode, folder = waiting.pop()
        safe = max((s for s in recording.synced.get(inode, ()) if s <= at), default=0)
        for name, (inside, is_folder) in _as_of(
            recording.folders.get(inode, []), random.randint(safe, at), {}
        ).items():
            place = folder / name
            if is_folder:
                place.mkdir()
                waiting.append((inside, place))
            else:
                place.write_bytes(_content(recording, inside, at, random))


def _content(recording: Recording, inode: int, at: int, random: Random) -> bytes:
    history = recording.files.get(inode, [])
    safe = max((s for s in recording.synced.get(inode, ()) if s <= at), default=0)
    kept = _as_of(history, safe, None)
    last = _as_of(history, at, None)
    if kept is not None and kept == last:
        return (recording.blobs / last).read_bytes()
    if last is None:
        return b""
    content = (recording.blobs / last).read_bytes()
    torn = content[: random.randint(0, len(content))]
    forms = [content, b"", torn, torn + bytes(len(content) - len(torn)), bytes(len(content))]
    if kept is not None:
        forms.append((recording.blobs / kept).read_bytes())
    return random.choice(forms)


def _as_of(history: list[Any], moment: int, default: Any) -> Any:
    """The last entry of a history that was noted no later than ``moment``."""
    return next((value for when, value in reversed(history) if when <= moment), default)
