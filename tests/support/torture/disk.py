"""A disk that is full, of bytes or of inodes: a message, and then the same command with more room.

On a file system in memory of a chosen size, which takes root and the right to mount.
"""

import os
import shutil
import subprocess
from pathlib import Path
from random import Random

from .world import Counts, World

TOLD = ("full", "room", "space", "inodes")


def full_disk(world: World, count: int, random: Random) -> Counts:
    """Whatever fails says that the disk is full; with room made, the rest is done."""
    counts = Counts("full disk (bytes, inodes), rerun")
    place = world.folder("disk")
    if not _mounted(place, "size=1m"):
        counts.notes.append("not run: this process may not mount a file system")
        return counts
    subprocess.run(["umount", place], check=True)
    pages, inodes = _needed(world)
    for number in range(count):
        share = random.random()
        limit = (
            f"size={max(int(share * pages), 4)}k"
            if number % 2
            else f"nr_inodes={max(int(share * inodes), 8)}"
        )
        _mounted(place, limit)
        problem = _filled(world, place)
        counts.count(problem and f"{limit}: {problem}")
        subprocess.run(["umount", "-l", place], check=True)
    shutil.rmtree(place)
    return counts


def _filled(world: World, place: Path) -> str | None:
    store = place / "store"
    ended = world.compress(store)
    if ended.how == "foreign":
        return f"foreign {ended.said}"
    if ended.how == "refused" and not any(word in str(ended.said) for word in TOLD):
        return f"refused without saying why: {ended.said}"
    if problem := world.differences(store, until=""):
        return problem
    subprocess.run(["mount", "-o", "remount,size=1g,nr_inodes=1000000", place], check=True)
    ended = world.compress(store)
    if ended.how != "done":
        return f"with room: {ended.how} {ended.said}"
    return world.differences(store)


def _mounted(place: Path, limit: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", limit, "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, check=False)
    return os.geteuid() == 0 and done.returncode == 0


def _needed(world: World) -> tuple[int, int]:
    """KiB (in pages) and inodes of the undisturbed store, and a quarter on top."""
    files = [p for stage in world.stages for p in (world.store / stage).rglob("*")]
    pages = sum(-(-p.stat().st_size // 4096) * 4 for p in files if p.is_file())
    return pages * 5 // 4, len(files) * 5 // 4
