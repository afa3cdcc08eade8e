"""Where a run's process and its workers on other machines hear of each other: a folder on the disk
that they share.

Workers write what they log there, and the run's process logs it. That one counts up a number: a
worker that sees it stand still, or gone, ends, for then nobody holds the lock of what it writes to.
Nothing here compares clocks of two machines.
"""

import contextlib
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dirotq.pipeline.disk import remove_tree

BEAT = 1.0
"""Seconds between two signs of life, and between two looks at what workers log."""
LEASE = 60.0
"""Seconds without one after which a worker ends: longer than a network file system caches."""
LEAVE = 3 * BEAT
"""Seconds after which a worker that sees the store has ended, once the desk is gone."""
SIGN = "alive"


@dataclass(frozen=True)
class Desk:
    """``folder`` belongs to it alone; workers log from ``level`` on."""

    folder: Path
    level: int

    @contextlib.contextmanager
    def open(self) -> Iterator["Desk"]:
        """Be there for workers until the block ends; then the folder goes."""
        self.folder.mkdir(parents=True)
        (self.folder / SIGN).write_text("0")
        over = threading.Event()
        attending = threading.Thread(target=self._attend, args=(over,), daemon=True)
        attending.start()
        try:
            yield self
        finally:
            over.set()
            attending.join()
            # Whoever told its last result may still be closing its log.
            with contextlib.suppress(OSError):  # the journal that it lies in goes later
                remove_tree(self.folder)

    @contextlib.contextmanager
    def seat(self) -> Iterator[None]:
        """Be a worker until the block ends: log to the desk, and end with it."""
        root, over = logging.getLogger(), threading.Event()
        name = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        before, level = root.handlers, root.level
        watching = threading.Thread(target=self._watch, args=(over,), daemon=True)
        with (self.folder / f"{name}.log").open("a", buffering=1) as file:
            root.handlers = [_Lines(file)]
            root.setLevel(self.level)
            watching.start()
            try:
                yield
            finally:
                over.set()
                root.handlers = before
                root.setLevel(level)

    def _attend(self, over: threading.Event) -> None:
        read: dict[Path, int] = {}
        count, ended = 0, False
        while not ended:
            ended = over.wait(BEAT)  # after the last sign there is a last look
            count += 1
            with contextlib.suppress(OSError):  # a full disk, which whoever makes units tells
                (self.folder / SIGN).write_text(str(count))
            for file in sorted(self.folder.glob("*.log")):
                with contextlib.suppress(OSError):
                    read[file] = _relay(file, read.get(file, 0))

    def _watch(self, over: threading.Event) -> None:
        last, since, missing = "", time.monotonic(), 0
        while not over.wait(BEAT):
            try:
                sign, missing = (self.folder / SIGN).read_text(), 0
            except FileNotFoundError:
                sign, missing = last, missing + 1
            except OSError:  # the network file system has a bad moment
                sign = last
            if sign != last:
                last, since = sign, time.monotonic()
            if missing > 1 or time.monotonic() - since > LEASE:
                os._exit(1)


class _Lines(logging.Handler):
    """Writes records as lines of JSON."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        told = {
            "name": record.name, "levelno": record.levelno, "levelname": record.levelname,
            "msg": message, "created": record.created, "process": record.process,
        }  # fmt: skip
        with contextlib.suppress(OSError, ValueError):  # no log is worth a unit
            self._file.write(json.dumps(told) + "\n")


def _relay(file: Path, start: int) -> int:
    """Log what stands in ``file`` from a position on; return where its whole lines end."""
    with file.open("rb") as stream:
        stream.seek(start)
        whole = stream.read().rpartition(b"\n")[0]
    for line in whole.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # torn by a node that vanished
            record = logging.makeLogRecord(json.loads(line))
            here = logging.getLogger(record.name)
            if here.isEnabledFor(record.levelno):
                here.handle(record)
    return start + len(whole) + bool(whole)
