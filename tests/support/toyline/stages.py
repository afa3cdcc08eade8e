"""numbers -> squares -> total, with faults to order."""

import errno
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from dirotq.errors import ConfigError, NumericalError
from dirotq.pipeline.stage import untracked
from dirotq.pipeline.store import Artifact
from dirotq.pipeline.units import Units


@dataclass(frozen=True, kw_only=True)
class ToyModel:
    """Known by what it holds, not by where it lies."""

    path: str
    offset: int

    def identity(self) -> dict[str, int]:
        return {"offset": self.offset}


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """One file per number; resumes at the first that is missing.

    trouble   a key of TROUBLE, raised at the third number
    ledger    file that gets one line per number really computed
    """

    version: ClassVar[str] = "1"
    resumable: ClassVar[bool] = True
    model: ToyModel
    count: int
    trouble: Literal["bug", "disk", "wrapped", "interrupt", "numbers"] | None = untracked()
    ledger: str | None = untracked()
    pause: float = untracked()

    def run(self, out: Path) -> Mapping[str, float]:
        units = Units(out)
        for i in units.todo(range(self.count), str, "numbers"):
            part = out / "parts" / f"{i}.json"
            part.parent.mkdir(exist_ok=True)
            if i == 2 and self.trouble:
                raise TROUBLE[self.trouble]
            if self.ledger:
                with Path(self.ledger).open("a") as ledger:
                    ledger.write(f"{i}\n")
            time.sleep(self.pause)
            scratch = out / "scratch"
            scratch.write_text(json.dumps(i + self.model.offset))
            scratch.replace(part)
            units.finish(str(i), [part])
        return {"count": self.count}


TROUBLE: dict[str, BaseException] = {
    "bug": RuntimeError("boom"),
    "disk": OSError(errno.ENOSPC, "No space left on device"),
    "wrapped": ValueError("I/O error: No space left on device (os error 28)"),
    "interrupt": KeyboardInterrupt(),
    "numbers": NumericalError("site blocks.3.ff: activations hold 7 non-finite values"),
}


@dataclass(frozen=True, kw_only=True)
class Squares:
    """The square of each number. ``power`` must be 2 or 3."""

    version: ClassVar[str] = "1"
    power: int
    fail: bool = untracked()

    def __post_init__(self) -> None:
        if self.power not in (2, 3):
            raise ConfigError(f"squares.power={self.power}: allowed are 2 and 3")

    def run(self, out: Path, *, numbers: Artifact) -> Mapping[str, float]:
        (out / "half").write_text("left over by a crash")
        if self.fail:
            raise RuntimeError("boom")
        (out / "half").unlink()
        parts = numbers.tree("parts").iterdir()
        squares = sorted(json.loads(part.read_text()) ** self.power for part in parts)
        (out / "squares.json").write_text(json.dumps(squares))
        return {"largest": squares[-1]}


@dataclass(frozen=True, kw_only=True)
class Total:
    """Their sum, and files of the names that the summary looks for."""

    version: ClassVar[str] = "1"

    def run(self, out: Path, *, numbers: Artifact, squares: Artifact) -> Mapping[str, float]:
        total = sum(json.loads(squares.file("squares.json").read_text()))
        (out / "model").mkdir()
        (out / "model" / "model_index.json").write_text(json.dumps({"total": total}))
        (out / "report.html").write_text(f"<p>{total}</p>")
        return {"total": total, "per_number": total / numbers.metrics["count"]}
