"""``faulty://``: files in memory behind a bad network, to order.

A share of requests fails at once, as a server's 500; a share is cut: of what was sent, half is
there, and of what was asked for, nothing comes. Others are slow.
"""

import random
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

__all__ = ["Faults", "faulty"]


class Faults:
    """What goes wrong; ``asked`` counts requests by kind, ``failed`` those that went wrong."""

    share = 0.0
    cut = 0.0
    slow = 0.0
    after: int | None = None
    """Every request beyond so many fails: the network is gone."""

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}
        self.failed = 0
        self.choose = random.Random(0)

    def meet(self, kind: str) -> bool:
        """Count a request; tell whether to cut it. Raises OSError for one that fails."""
        self.asked[kind] = self.asked.get(kind, 0) + 1
        if self.slow and self.choose.random() < 0.1:
            time.sleep(self.slow)
        if self.after is not None and sum(self.asked.values()) > self.after:
            raise ConnectionResetError("the network is gone")
        if self.choose.random() < self.share:
            self.failed += 1
            raise OSError(121, "500 Internal Server Error")
        cut = self.choose.random() < self.cut
        self.failed += cut
        return cut


class FaultyFiles(MemoryFileSystem):
    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    faults = Faults()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("faulty://", "memory://"))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        if self.faults.meet("get"):
            raise ConnectionResetError("cut in the middle")
        return super().cat_file(path, start=start, end=end, **kwargs)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._arrive(path, value)

    def put_file(self, lpath: str, rpath: str, callback: Any = None, **kwargs: Any) -> None:
        with open(lpath, "rb") as file:  # noqa: PTH123
            self._arrive(rpath, file.read())

    def info(self, path: str, **kwargs: Any) -> Any:
        if self.faults.meet("info"):
            raise TimeoutError("no answer")
        return super().info(path, **kwargs)

    def _arrive(self, path: str, data: bytes) -> None:
        if self.faults.meet("put"):
            super().pipe_file(path, data[: len(data) // 2])
            raise ConnectionResetError("cut in the middle")
        super().pipe_file(path, data)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """The faults of ``faulty://...``, which is empty; attempts follow each other at once."""
    fsspec.register_implementation("faulty", FaultyFiles, clobber=True)
    monkeypatch.setattr("dirotq.pipeline.remote.PAUSE", 0)
    FaultyFiles.store.clear()
    FaultyFiles.faults = Faults()
    yield FaultyFiles.faults
    FaultyFiles.store.clear()
