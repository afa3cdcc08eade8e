"""Places that can't be written, other users, other umasks, links in the way, clocks that jump."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from .damage import flip
from .world import Counts, Ended, World, forked

NOBODY = 65534


def places(world: World, count: int, random: Random) -> Counts:
    """Each of the situations below ``count`` times over, with other details each time."""
    counts = Counts("read-only places, other users, links, clocks")
    if os.geteuid():
        counts.notes.append("not run: only root can become another user")
        return counts
    for number in range(count):
        situation = SITUATIONS[number % len(SITUATIONS)]
        place = world.folder("place")
        place.chmod(0o755)
        problem = situation(world, place, random)
        counts.count(problem and f"{situation.__name__}: {problem}")
        shutil.rmtree(place)
    return counts


def read_only_store(world: World, place: Path, random: Random) -> str | None:
    """All is cached: the same command works for somebody who may only read."""
    store = world.copy(place / "store")
    return all_cached(world, store, before=lambda: _become(NOBODY))


def read_only_cache(world: World, place: Path, random: Random) -> str | None:
    """DIROTQ_CACHE and HF_HOME can't be written."""

    def before() -> None:
        for name in ("DIROTQ_CACHE", "HF_HOME", "HOME"):
            os.environ[name] = str(place / "nothing")
        _become(NOBODY)

    (place / "theirs").mkdir()
    os.chown(place / "theirs", NOBODY, NOBODY)
    ended = world.compress(place / "theirs" / "store", "until=capture", before=before)
    return None if ended.how == "done" else f"{ended.how}: {ended.said}"


def unwritable_store(world: World, place: Path, random: Random) -> str | None:
    """Something is left to do: a message that names the folder."""
    store = world.copy(place / "store", without=random.choice(world.stages))
    ended = world.compress(store, before=lambda: _become(NOBODY))
    right = ended.how == "refused" and str(store) in str(ended.said)
    return None if right else f"{ended.how}: {ended.said}"


def another_umask(world: World, place: Path, random: Random) -> str | None:
    """Modes of what is published follow the umask: group and others read what they may."""
    mask = random.choice((0o002, 0o022, 0o027, 0o077))
    last = world.stages[-1] if "pack" not in world.stages else "pack"
    store = world.copy(place / "store", without=random.choice((last, "capture")))
    for path in store.rglob("*"):
        path.chmod(0o777 if path.is_dir() else 0o666)  # what is older is not what is looked at
    began = time.time() - 0.01
    ended = world.compress(store, f"until={last}", before=lambda: os.umask(mask) and None)
    if ended.how != "done":
        return f"{ended.how}: {ended.said}"
    for path in store.rglob("*"):
        stat = path.stat()
        want = (0o777 if path.is_dir() else 0o666) & ~mask
        new = stat.st_ctime > began and not path.is_relative_to(store / ".locks")
        if new and path.parent != store and stat.st_mode & 0o777 not in (want, 0o777, 0o666):
            return f"umask {mask:03o}: {path.relative_to(store)} has {stat.st_mode & 0o777:03o}"
    return None


def linked_component(world: World, place: Path, random: Random) -> str | None:
    """A component is a link to a folder: another folder behind it is another model."""
    model = Path(shutil.copytree(world.root / "model", place / "model"))
    part = random.choice([p.name for p in model.iterdir() if list(p.glob("*.safetensors"))])
    shutil.move(model / part, place / "first")
    shutil.copytree(place / "first", place / "second")
    (weights,) = (place / "second").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-8] ^= 1  # of a number's mantissa
    weights.write_bytes(content)
    said = []
    for target in ("first", "second"):
        (model / part).unlink(missing_ok=True)
        (model / part).symlink_to(place / target)
        ended = world.compress(place / "store", f"model={model}", "until=capture")
        if ended.how != "done":
            return f"{part} -> {target}: {ended.how} {ended.said}"
        said.append(ended.said["capture"])
    return f"{part}: both are {said[0]}" if said[0] == said[1] else None


def retargeted_file(world: World, place: Path, random: Random) -> str | None:
    """Any file of the model is a link: what is behind it counts, or the link is refused."""
    model = Path(shutil.copytree(world.root / "model", place / "model"))
    files = [p for p in model.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".json")]
    file = random.choice(files)
    target = place / "elsewhere"
    shutil.move(file, target)
    file.symlink_to(target)
    first = world.compress(place / "store", f"model={model}", "until=capture")
    if first.how == "foreign":
        return f"{file.name}: {first.said}"
    flip(target, random)
    second = world.compress(place / "store", f"model={model}", "until=capture")
    if second.how == "foreign":
        return f"{file.name}, one bit over: {second.said}"
    same = first.how == second.how == "done" and first.said["capture"] == second.said["capture"]
    return f"{file.relative_to(model)}: another content, the same model" if same else None


def file_times(world: World, place: Path, random: Random) -> str | None:
    """Times of files are of 1970, or of tomorrow: nothing is done again."""
    store = world.copy(place / "store")
    for path in store.rglob("*"):
        when = random.choice((0, time.time() + 86_400, time.time() - 10**8))
        os.utime(path, (when, when))
    return all_cached(world, store)


def clock_jumps(world: World, place: Path, random: Random) -> str | None:
    """The clock goes back, or on, between any two calls."""
    store = world.copy(place / "store", without=random.choice(world.stages))
    plain, leaps = time.time, Random(random.getrandbits(32))

    def before() -> None:
        time.time = lambda: plain() + leaps.uniform(-(10**6), 10**6)

    ended = world.compress(store, before=before)
    if ended.how != "done":
        return f"{ended.how}: {ended.said}"
    return world.differences(store) or all_cached(world, store)


def special_files(world: World, place: Path, random: Random) -> str | None:
    """A fifo, a folder or a link to itself in the place of a file: named, and no hang."""
    store = world.copy(place / "store")
    files = [p for stage in world.stages for p in (store / stage).rglob("*") if p.is_file()]
    file = random.choice([p for p in files if p.name != "provenance.json"])
    file.unlink()
    kind = random.choice(("fifo", "folder", "loop"))
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(file)
    done = subprocess.run(
        [*_dirotq(), "verify", f"store={store}"], capture_output=True, text=True, timeout=60,
        check=False, env=_environment(),
    )  # fmt: skip
    if done.returncode == 2 and "Traceback" not in done.stderr and "DAMAGED" in done.stdout:
        return None
    return f"{kind} for {file.relative_to(store)}: {done.returncode} {done.stderr[-600:]}"


SITUATIONS: tuple[Callable[[World, Path, Random], str | None], ...] = (
    read_only_store, read_only_cache, unwritable_store, another_umask, linked_component,
    retargeted_file, file_times, clock_jumps, special_files,
)  # fmt: skip


def all_cached(
    world: World, store: Path, *more: str, before: Callable[[], None] | None = None
) -> str | None:
    """Nothing is made again by the same command."""

    def job() -> int:
        from tiny_line import run

        from dirotq.pipeline.store import ArtifactStore

        if before is not None:
            before()
        made = run(world.line(store, *more))
        for artifact in made.values():
            ArtifactStore(store).verify(artifact)
        return len(made)

    was = {p: p.stat().st_mtime_ns for p in store.glob("*/*/manifest.json")}
    ended: Ended = forked(job)
    if ended.how != "done":
        return f"{ended.how}: {ended.said}"
    now = {p: p.stat().st_mtime_ns for p in store.glob("*/*/manifest.json")}
    return None if was == now else "stages ran again"


def _become(user: int) -> None:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


def _dirotq() -> list[str]:
    import sys

    return [sys.executable, "-m", "dirotq"]


def _environment() -> dict[str, str]:
    import dirotq

    return dict(os.environ, PYTHONPATH=str(Path(dirotq.__file__).parents[1]))
