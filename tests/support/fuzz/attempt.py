"""One example given to one reader, and what it may not do: raise what is not ours, hang, or write
outside of its folder.
"""

import functools
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

from fair_time import fair_seconds

from dirotq.errors import DirotqError

Read = Callable[[Path, Any], Any]
"""Gets an empty folder and an example; puts the example there and reads it."""

HANG = 5.0
"""Seconds that a reader may take."""
ROOT = Path(__file__).resolve().parents[3]
CHANGES = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate",
    "os.chmod", "shutil.rmtree", "shutil.move",
}  # fmt: skip
"""Audit events (PEP 578) that change a path, beside `open`."""


@dataclass(frozen=True)
class Finding:
    """What went wrong; two findings of one ``kind`` and ``what`` are the same fault."""

    kind: str
    what: str
    detail: str
    example: str


class _Hang(BaseException):
    pass


@contextmanager
def sandbox() -> Iterator[Path]:
    """A folder for examples, with HOME, every cache and the working directory beside it."""
    root = Path(tempfile.mkdtemp(prefix="fuzz-")).resolve()
    before, here = dict(os.environ), Path.cwd()
    for name in ("home", "allowed", "allowed/cache", "allowed/store"):
        (root / name).mkdir()
    os.environ |= {
        "HOME": str(root / "home"),
        "XDG_CACHE_HOME": str(root / "home" / ".cache"),
        "HF_HOME": str(root / "home" / "hf"),
        "HF_HUB_OFFLINE": "1",
        "DIROTQ_CACHE": str(root / "allowed" / "cache"),
        "DIROTQ_STORE": str(root / "allowed" / "store"),
    }
    os.chdir(root / "home")
    try:
        yield root
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ |= before
        shutil.rmtree(root)


def attempt(read: Read, example: Any, root: Path) -> Finding | None:
    """None if the reader accepts the example or refuses it with an error of ours.

    root  a :func:`sandbox`
    """
    folder = root / "allowed" / "example"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shown = repr(example)[:2000]
    began = fair_seconds()
    outside: list[str] = []
    try:
        with _quiet(), _limit(HANG), _watched(root / "allowed", outside):
            read(folder, example)
    except DirotqError:
        pass
    except KeyboardInterrupt:
        raise
    except _Hang as error:
        return Finding("hang", _place(error), f"more than {HANG} s", shown)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the finding
        where = f"{type(error).__name__} {_place(error)}"
        return Finding("foreign", where, str(error)[:300], shown)
    if outside or (outside := [str(p) for p in (root / "home").rglob("*")]):
        shutil.rmtree(root / "home")
        (root / "home").mkdir()
        os.chdir(root / "home")
        return Finding("outside", outside[0].replace(str(root), "..."), str(outside[:3]), shown)
    if fair_seconds() - began > HANG:  # in C, where no signal arrives
        return Finding("hang", "", f"more than {HANG} s", shown)
    return None


def _place(error: BaseException) -> str:
    """The last line of ours that it passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        frame
        for frame in frames
        if frame.filename.startswith(f"{ROOT}/")
        and not frame.filename.endswith("fuzz/attempt.py")
        and ".venv" not in frame.filename
    ]
    last = ours[-1] if ours else frames[-1]
    return f"{Path(last.filename).name}:{last.lineno} {last.name}"


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise _Hang after ``seconds``; a timer that ran before runs on."""

    def ring(number: int, frame: FrameType | None) -> None:
        rest = seconds - (fair_seconds() - fair)
        if rest <= 0:
            raise _Hang
        signal.setitimer(signal.ITIMER_REAL, max(rest, 0.01))  # it had to wait for a processor

    handler = signal.signal(signal.SIGALRM, ring)
    began, fair = time.monotonic(), fair_seconds()
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 0.01))


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the screen, and logging as it was."""
    logger = logging.getLogger()
    handlers, level, streams = list(logger.handlers), logger.level, (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = StringIO(), StringIO()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        logger.handlers[:] = handlers
        logger.setLevel(level)


@contextmanager
def _watched(allowed: Path, outside: list[str]) -> Iterator[None]:
    """Note every path outside of ``allowed`` that Python code opens for writing or changes."""

    def note(path: object) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            full = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 (links stay links)
            inside = full.startswith((f"{allowed}/", "/dev/", "/proc/"))
            if not inside and full != str(allowed) and "__pycache__" not in full:
                outside.append(full)

    watchers = _watchers()
    watchers.append(note)
    try:
        yield
    finally:
        watchers.remove(note)


@functools.cache
def _watchers() -> list[Callable[[object], None]]:
    """Who is told of writes. An audit hook stays for good, so there is one for all."""
    watchers: list[Callable[[object], None]] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not watchers:
            return
        if event == "open" and len(args) == 3:
            flags = args[2] if isinstance(args[2], int) else 0
            paths = [args[0]] if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else []
        elif event in ("os.remove", "os.rmdir") and args[1:] != (-1,):
            paths = []  # below an open folder, as rmtree does it: that one was noted
        elif event in ("os.link", "os.symlink"):
            paths = list(args[1:2])  # what it leads to stays as it is
        else:
            paths = list(args) if event in CHANGES else []
        for path in paths:
            for note in list(watchers):
                note(path)

    sys.addaudithook(hook)
    return watchers
