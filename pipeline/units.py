"""Finished units of a stage's work, with the digest of every file, for a run that goes on later.

A unit is what is done again as a whole when it is lost: a site, a shard of calls, an image. Each
has one small file in ``<out>/.units``, written after the unit's own files. No order of writes is
asked of the disk: whatever a power cut leaves empty, torn or stale does not match its digest.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from dirotq.errors import ArtifactError, UnsupportedError
from dirotq.files.digest import file_digest
from dirotq.pipeline.disk import files_below, remove_tree, sync, sync_all, write_json
from dirotq.pipeline.stage import recipe

log = logging.getLogger(__name__)

T = TypeVar("T")
Made = tuple[str, Sequence[Path]]
"""A unit's name, and its files and folders: written and closed."""

JOURNAL = ".units"
TIMES = "times.json"
"""In the journal: what the units of a stage took."""
LARGE = 1 << 20
"""Bytes of a file that goes to the disk as soon as it is finished."""
LOOK = 5.0
"""Seconds between two looks at a stage's inputs: one costs some milliseconds."""


class Units:
    """What is finished in a stage's output folder ``out``, which belongs to the stage alone.

    Opening it reads what an earlier run left: a unit counts if its entry is whole and each of its
    files has the size and SHA-256 that stand there. Every other file is removed, so that nothing
    half done is read, or published. Units may share files (the metadata of a Zarr array).

    ``of``     the stage that makes them. An entry is written once the stage's model and prompts
               were seen to be what they were when it began: units of other inputs never count, not
               even if the run is killed and the inputs come back
    ``apart``  files in ``out``, by their names, that look after themselves
    """

    def __init__(self, out: Path, of: Any = None, apart: Collection[str] = ()) -> None:
        self._open(out, of, recipe(of), apart)
        present = _files(out) if out.is_dir() else []
        entries = [file for file in present if file.parent == self._journal]
        self._keep_only(self._intact(entries, present))

    @classmethod
    def joined(cls, out: Path, of: Any, known: Any) -> "Units":
        """Return the units of one of several processes at work in ``out``, which another opened.

        It finishes some, and neither looks at others nor removes anything.

        known  the recipe of ``of`` when the stage began
        """
        units = cls.__new__(cls)
        units._open(out, of, known, ())
        return units

    def _open(self, out: Path, of: Any, known: Any, apart: Collection[str]) -> None:
        self.out, self.apart = out, frozenset(apart)
        self._journal = out / JOURNAL
        self._of, self._recipe, self._looked = of, known, time.monotonic()
        self._waiting: dict[Path, dict[str, Any]] = {}
        self._files: dict[str, frozenset[str]] = {}
        self._spelled: dict[str, str] = {}
        self._times: dict[str, Any] | None = None

    def done(self, name: str) -> bool:
        """Tell whether the unit was finished, by this run or by one before it."""
        return name in self._files

    def todo(self, items: Iterable[T], name: Callable[[T], str], what: str) -> list[T]:
        """List the items, in order, whose unit ``name(item)`` is to do; ``what`` names them."""
        given = list(items)
        left = [item for item in given if not self.done(name(item))]
        if len(left) < len(given):
            log.info("%s: %d of %d were finished before", what, len(given) - len(left), len(given))
        return left

    def finish(self, name: str, parts: Iterable[Path], seconds: float | None = None) -> None:
        """Note that the unit is finished: ``parts`` are its files and folders, written and closed.

        seconds  that it took to make

        They are hashed now, in threads, while they are in the page cache. Large ones go to the disk
        now, beside what is computed: together, at the end of the stage, they would be waited for.

        Raises UnsupportedError if the disk took a file for one of another unit, ArtifactError if
        the stage's inputs changed.
        """
        files = {file for part in parts for file in _files(part)}
        found = self._hashed(files)
        if lost := files - {self.out / file for file in found}:
            raise FileNotFoundError(f"{min(lost)} of the unit {name!r} can't be read")
        self._add(name, found)
        sync_all(self.out / file for file, entry in found.items() if entry["bytes"] >= LARGE)
        entry = {"unit": name, "files": found} | ({} if seconds is None else {"seconds": seconds})
        self._waiting[self._journal / _entry_name(name)] = entry
        if self._of is None or time.monotonic() - self._looked >= LOOK:
            self._write_waiting()

    def finishing(self, made: Iterable[Made]) -> Generator[str, None, None]:
        """Yield the names of units as they are made; as soon as the next is asked for, finish the
        last in a thread, so that one is hashed while the next is computed.
        """
        with ThreadPoolExecutor(1) as pool:  # an error elsewhere waits for what is being hashed
            last: Future[None] | None = None
            began = time.monotonic()
            for name, parts in made:
                seconds = round(time.monotonic() - began, 4)
                if last is not None:
                    last.result()
                last = pool.submit(self.finish, name, parts, seconds)
                yield name
                began = time.monotonic()
            if last is not None:
                last.result()

    def flush(self) -> None:
        """Write the entries of all that is finished, whenever the inputs were looked at last."""
        if self._waiting:
            self._write_waiting()

    def sweep(self) -> None:
        """Remove what belongs to no finished unit: what workers that died had half written."""
        self._keep_only(self._files)

    def adopt(self, names: Iterable[str]) -> list[str]:
        """Take over what other processes finished here; return those of ``names`` that are intact.

        Raises UnsupportedError if the disk took a file for one of another unit.
        """
        entries = [self._journal / _entry_name(name) for name in names]
        named = {self.out / file for found in map(_read, entries) if found for file in found[1]}
        present = [file for file in named if file.is_file() and not file.is_symlink()]
        intact = self._intact(entries, present)
        for name, files in intact.items():
            self._add(name, files)
        return [name for name in names if name in intact]

    def note_times(self, names: Sequence[str], wall: float) -> None:
        """Keep what the named units took, for provenance.json: seconds of each, and of all."""
        entries = [_content(self._journal / _entry_name(name)) for name in names]
        took = [entry.get("seconds") for entry in entries]
        self._times = {"seconds": took, "wall": round(wall, 3)} if None not in took else None

    def write_times(self) -> None:
        """Leave what was noted where the store finds it, at the end of a stage."""
        if self._times and self._journal.is_dir():
            write_json(self._journal / TIMES, self._times)

    def _write_waiting(self) -> None:
        if recipe(self._of) != self._recipe:
            raise ArtifactError(
                "the model or the prompts changed while they were read. Leave them alone until the "
                "run ends; the same command plans anew"
            )
        self._journal.mkdir(exist_ok=True)
        for file, entry in self._waiting.items():
            write_json(file, entry)
        self._waiting, self._looked = {}, time.monotonic()

    def _add(self, name: str, files: Iterable[str]) -> None:
        for file in files:
            other = self._spelled.setdefault(file.casefold(), file)
            if other != file and (self.out / other).samefile(self.out / file):
                raise UnsupportedError(
                    f"{other} and {file} are one file on this disk, which does not tell upper from "
                    "lower case: choose a store on one that does (store=FOLDER)"
                )
        self._files[name] = frozenset(files)

    def _intact(self, journal: Iterable[Path], present: list[Path]) -> dict[str, frozenset[str]]:
        """Return {unit: its files, relative to ``out``} of entries whose files are as finished.

        present  files that may be meant, each a regular one
        """
        entries = [found for file in journal if (found := _read(file))]
        named = {file for _, files in entries for file in files}
        have = self._hashed(file for file in present if self._relative(file) in named)
        return {
            name: frozenset(files)
            for name, files in entries
            if all(file in have and have[file] == entry for file, entry in files.items())
        }

    def _hashed(self, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
        """Return the journal's entries of readable files, in order of their names."""
        ordered = sorted(set(files))
        with ThreadPoolExecutor() as pool:  # hashing releases the GIL
            found = zip(map(self._relative, ordered), pool.map(_entry, ordered), strict=True)
            return {name: entry for name, entry in found if entry is not None}

    def _keep_only(self, units: dict[str, frozenset[str]]) -> None:
        """Remove what none of these units owns, and folders that are empty then."""
        self._files = units
        self._spelled = {file.casefold(): file for files in units.values() for file in files}
        owned = frozenset[str]().union(*self._files.values(), self.apart)
        owned |= {f"{JOURNAL}/{_entry_name(name)}" for name in self._files}
        for folder, folders, files in os.walk(self.out, topdown=False):
            for name in files:
                if self._relative(path := Path(folder, name)) not in owned:
                    path.unlink(missing_ok=True)  # a worker of a dead run may still rename it
            for name in folders:
                if (path := Path(folder, name)).is_symlink():
                    path.unlink()
                else:
                    with contextlib.suppress(OSError):  # it holds something
                        path.rmdir()

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.out).as_posix()


def times(out: Path) -> dict[str, Any]:
    """Return what provenance.json says of the units of the stage in ``out``; nothing without."""
    found = _content(out / JOURNAL / TIMES)
    return {"units": found} if found else {}


def refuse_changed(out: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Hold what is about to be published, {file: its digest and size}, against the journal.

    Raises ArtifactError for a file that changed since its unit was finished.
    """
    for unit, own in filter(None, map(_read, (out / JOURNAL).glob("*.json"))):
        for name, entry in own.items():
            if name in files and files[name] != entry:
                raise ArtifactError(
                    f"{name} changed after {unit!r} was finished: another program, or a worker "
                    "that was taken for dead, writes to the store. Nothing was published; the same "
                    "command makes it anew"
                )


def retire(out: Path) -> None:
    """Remove the journal from a folder that is about to be published, for good."""
    if (journal := out / JOURNAL).exists():
        remove_tree(journal)  # a worker of the last units may still close its log in there
        sync(out)


def _entry(file: Path) -> dict[str, Any] | None:
    """Return the journal's entry of a file; None for one that can't be read."""
    try:
        return {"sha256": file_digest(file), "bytes": file.stat().st_size}
    except OSError:
        return None


def _entry_name(unit: str) -> str:
    """Name the journal's file; a digest, since any name can be a unit's."""
    return f"{hashlib.sha256(unit.encode()).hexdigest()[:32]}.json"


def _read(entry: Path) -> tuple[str, dict[str, Any]] | None:
    """Read unit and files of one entry of the journal; None if it is damaged in whatever way."""
    with contextlib.suppress(ValueError):  # a name that no text file holds
        match _content(entry):
            case {"unit": str(name), "files": dict(files)} if entry.name == _entry_name(name):
                return name, files
    return None


def _content(file: Path) -> dict[str, Any]:
    """Read a file of the journal; nothing if it is damaged in whatever way."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if isinstance(found := json.loads(file.read_text()), dict):
            return found
    return {}


def _files(part: Path) -> list[Path]:
    """List ``part``, or every regular file below it; links are none, wherever they lead."""
    if not part.is_dir():
        return [part]
    return [path for path in files_below(part) if path.is_file() and not path.is_symlink()]
