"""Files of a finished store, changed: whoever reads them next has to notice before it uses them.

Each attempt changes one file in one way and lets one reader at it:

verify   ``dirotq verify`` of its artifact
next     the stage that reads the artifact, computed anew
load     ``dirotq.load`` of the packed folder
copy     ``dirotq.load`` of a copy of that folder, elsewhere
"""

import io
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from .world import STAGES, Counts, Ended, World, forked

READERS = {
    "capture": ("basis", "rank", "gptq", "fuse", "validate"),
    "basis": ("rank", "gptq", "fuse", "validate"),
    "rank": ("gptq", "fuse", "pack", "validate"),
    "gptq": ("pack",),
    "fuse": ("pack",),
    "pack": ("validate",),
    "reference": ("validate",),
}
"""Which stages read a stage's artifact."""


def flip(file: Path, random: Random) -> None:
    """Turn one bit over."""
    content = bytearray(file.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    _rewrite(file, bytes(content))


def truncate(file: Path, random: Random) -> None:
    """Cut the end off."""
    _rewrite(file, file.read_bytes()[: random.randrange(file.stat().st_size)])


def extend(file: Path, random: Random) -> None:
    """Append zeros."""
    _rewrite(file, file.read_bytes() + bytes(random.randint(1, 64)))


def delete(file: Path, random: Random) -> None:
    """Remove it."""
    file.unlink()


def swap(file: Path, random: Random) -> None:
    """Exchange it with another file of its name; flip a bit if there is none."""
    alike = [
        p
        for p in file.parent.parent.rglob(f"*{file.suffix}")
        if p.is_file() and p.name == file.name and p.read_bytes() != file.read_bytes()
    ]
    if not alike:
        return flip(file, random)
    other, mine = random.choice(alike), file.read_bytes()
    _rewrite(file, other.read_bytes())
    _rewrite(other, mine)
    return None


def link(file: Path, random: Random) -> None:
    """Put a link in its place, to a copy elsewhere that was changed."""
    elsewhere = file.parents[len(file.parents) - 3] / f"elsewhere-{random.getrandbits(32):08x}"
    shutil.move(file, elsewhere)
    flip(elsewhere, random)
    file.symlink_to(elsewhere)


def same_times(file: Path, random: Random) -> None:
    """Turn one bit over, and put size and modification time back as they were."""
    stat = file.stat()
    flip(file, random)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


WAYS: tuple[Callable[[Path, Random], None], ...] = (
    flip, truncate, extend, delete, swap, link, same_times,
)  # fmt: skip


def damage(world: World, count: int, random: Random) -> Counts:
    """Every change is noticed before it is used."""
    counts = Counts("changed files, noticed before use")
    kinds = _kinds(world)
    for number in range(count):
        stage, files = kinds[number % len(kinds)]
        way = WAYS[(number // len(kinds)) % len(WAYS)]
        name = random.choice(files)
        after = READERS.get(stage, ("",))[0]
        readers = ["verify", *(("next",) if after in world.stages else ())]
        readers += ["load", "copy"] if stage == "pack" else []
        reader = random.choice(readers)
        store = world.copy(world.folder("damage") / "store")
        (artifact,) = (p for p in (store / stage).iterdir() if p.is_dir())
        target = artifact / name
        if target.stat().st_size == 0 and way is not delete:
            way = extend
        way(target, random)
        said = f"{way.__name__} {stage}/{name}, read by {reader}"
        counts.count(_read(world, store, stage, artifact, name, reader, said))
        shutil.rmtree(store.parent)
    return counts


def _read(
    world: World, store: Path, stage: str, artifact: Path, name: str, reader: str, said: str
) -> str | None:
    """What went wrong, or None."""
    model = artifact / "data" / "model"
    if reader == "verify":
        ended = forked(lambda: _verify(store, artifact))
    elif reader == "next":
        after = READERS[stage][0] if stage != "capture" else "basis"
        return _next(world, store, stage, after, said)
    else:
        folder = model if reader == "load" else Path(shutil.copytree(model, store.parent / "copy"))
        ended = forked(lambda: _load(folder))
        if ended.how == "done" and not name.startswith("data/model/"):
            return None  # nothing of the folder was changed
        if ended.how == "done" and name.endswith("README.md"):
            return None  # people edit it, nobody reads it
        if ended.how == "done" and ("can't be checked" in ended.said or _same_list(world, model)):
            return None  # without a list it says so; a digest may be in capitals
    return None if ended.how == "refused" else f"{said}: {ended.how} {ended.said or ''}"


def _next(world: World, store: Path, stage: str, after: str, said: str) -> str | None:
    """The stage refuses; or it never read the file, and its bytes are the undisturbed ones."""
    shutil.rmtree(store / after)
    for later in STAGES[STAGES.index(after) + 1 :]:
        shutil.rmtree(store / later, ignore_errors=True)
    ended = world.compress(store, f"until={after}")
    if ended.how == "refused":
        return None
    if ended.how != "done":
        return f"{said}: {ended.how} {ended.said}"
    (made,) = (p for p in (store / after).iterdir() if p.is_dir())
    (want,) = (p for p in (world.store / after).iterdir() if p.is_dir())
    from .world import _differs

    different = made.name != want.name or _differs(made, want)
    return f"{said}: silent, {different}" if different else None


def _verify(store: Path, artifact: Path) -> None:
    from dirotq.pipeline.store import ArtifactStore

    opened = ArtifactStore(store)
    found = opened.get(artifact.parent.name, artifact.name)
    if found is None:
        from dirotq.errors import ArtifactError

        raise ArtifactError("there is no such artifact any more")
    opened.verify(found)


def _load(folder: Path) -> str:
    """Load it; what was said meanwhile."""
    import dirotq

    said = io.StringIO()
    logging.getLogger().addHandler(logging.StreamHandler(said))
    dirotq.load(folder, device="cpu")
    return said.getvalue()


def _same_list(world: World, model: Path) -> bool:
    """Whether the list of digests says the same as ever, and all files are as it says."""
    from dirotq.errors import ArtifactError
    from dirotq.files.sums import check_sums, read_sums

    (undisturbed,) = (p for p in (world.store / "pack").iterdir() if p.is_dir())
    try:
        return read_sums(model) == read_sums(undisturbed / "data/model") and check_sums(model)
    except ArtifactError:
        return False


def _kinds(world: World) -> list[tuple[str, list[str]]]:
    """Files of the undisturbed store by stage and kind, provenance (advice only) apart."""
    found: dict[tuple[str, str], list[str]] = {}
    for stage in world.stages:
        (artifact,) = (p for p in (world.store / stage).iterdir() if p.is_dir())
        for file in sorted(p for p in artifact.rglob("*") if p.is_file()):
            name = file.relative_to(artifact).as_posix()
            if name != "provenance.json":
                kind = "chunk" if "/c/" in name else file.suffix or file.name
                parts = name.split("/")
                part = parts[2] if parts[:2] == ["data", "model"] and len(parts) > 3 else ""
                found.setdefault((stage, f"{part}{kind}"), []).append(name)
    return [(stage, names) for (stage, _), names in sorted(found.items())]


__all__ = ["READERS", "WAYS", "Ended", "damage"]


def _rewrite(file: Path, content: bytes) -> None:
    file.chmod(0o644)
    file.write_bytes(content)
