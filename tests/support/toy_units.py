"""A divided stage whose units misbehave to order, for processes that import no torch.

    python tests/support/toy_units.py OUT WORKERS COUNT PAUSE

makes units until it is stopped.
"""

import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from dirotq.errors import NumericalError
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.crew import Crew
from dirotq.pipeline.divided import Make, NotShared, in_units
from dirotq.pipeline.stage import untracked
from dirotq.pipeline.units import JOURNAL, Made, Units
from dirotq.pipeline.worker import Processes

log = logging.getLogger(__name__)


def content(out: Path) -> dict[str, str]:
    """Every file that units made below ``out``, with its text."""
    return {
        path.relative_to(out).as_posix(): path.read_text()
        for path in out.rglob("*")
        if path.is_file() and JOURNAL not in path.parts
    }


def alone(stage: "Parts", out: Path) -> dict[str, str]:
    """What one process makes of a stage."""
    out.mkdir()
    in_units(stage, out, {})
    return content(out)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """``count`` small files.

    harm    {unit: "die", "die once" or "fail"}
    ledger  folder that gets a file ``<unit> <process> ...`` for every unit that was begun
    """

    version: ClassVar[str] = "1"
    resumable: ClassVar[bool] = True
    what: ClassVar[str] = "parts"

    count: int
    ledger: str = untracked()
    harm: Mapping[str, str] = field(default_factory=dict, metadata={"tracked": False})
    pause: float = untracked(default=0.0)

    def run(self, out: Path) -> Mapping[str, float]:
        return in_units(self, out, {})

    def units(self) -> list[str]:
        return [f"part {i:02d}" for i in range(self.count)]

    def maker(self, out: Path, left: Sequence[str]) -> Make:
        log.info("opened for %d", len(left))
        (out / "parts").mkdir(exist_ok=True)

        def make(names: Iterable[str]) -> Iterator[Made]:
            for name in names:
                self.begin(name, out / "parts" / name)
                time.sleep(self.pause)
                (out / "parts" / name).write_text(f"content of {name}")
                yield name, [out / "parts" / name]

        return make

    def merge(self, units: Units) -> Mapping[str, float]:
        parts = [units.out / "parts" / name for name in self.units()]
        (units.out / "all").write_text("\n".join(part.read_text() for part in parts))
        return {"parts": len(parts)}

    def begin(self, name: str, file: Path) -> None:
        """Note that a unit was begun, then do it the harm that was ordered."""
        first = not self.begun(name)
        Path(self.ledger, f"{name} {os.getpid()} {uuid.uuid4().hex}").touch()
        harm = self.harm.get(name, "")
        if harm == "die" or (harm == "die once" and first):
            file.write_text("half")
            file.with_name(f".{name}.half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        if harm == "fail":
            raise NumericalError(f"{name}: not finite")

    def begun(self, name: str = "") -> list[tuple[str, str]]:
        """(unit, process) of every unit of that name that was begun; of all, without a name."""
        found = (path.name.rsplit(" ", 2) for path in sorted(Path(self.ledger).iterdir()))
        return [(unit, process) for unit, process, _ in found if unit == name or not name]


@dataclass(frozen=True, kw_only=True)
class ReadsFirst(Parts):
    """Reads one file of the artifact ``first``."""

    def units(self, *, first: Artifact) -> list[str]:
        return super().units()

    def maker(self, out: Path, left: Sequence[str], *, first: Artifact) -> Make:
        first.file("read")
        return super().maker(out, left)

    def merge(self, units: Units, *, first: Artifact) -> Mapping[str, float]:
        return {}


@dataclass(frozen=True, kw_only=True)
class Tower(Parts):
    """Parts, and on them floors: one stands on another, and every process lays bricks of each.

    ``unshared``  processes refuse to build together
    """

    unshared: bool = untracked(default=False)

    def followed(self) -> "Floors":
        return Floors(count=4, ledger=self.ledger, harm=self.harm, unshared=self.unshared)

    def merge(self, units: Units) -> Mapping[str, float]:
        return {"floors": len(list((units.out / "floors").iterdir()))}


@dataclass(frozen=True, kw_only=True)
class Floors(Parts):
    """Six bricks for each, laid in the order of the processes."""

    what: ClassVar[str] = "floors"

    unshared: bool = untracked()
    index: int = untracked(default=0)
    parts: int = untracked(default=1)
    meeting: str = untracked(default="")

    def units(self) -> list[str]:
        return [f"floor {i}" for i in range(self.count)]

    def part(self, index: int, count: int, meeting: Path) -> "Floors":
        return replace(self, index=index, parts=count, meeting=str(meeting))

    def maker(self, out: Path, left: Sequence[str]) -> Make:
        if self.unshared and self.parts > 1:
            raise NotShared("no two builders agree")
        (out / "floors").mkdir(exist_ok=True)
        if self.parts > 1:
            Path(self.meeting).mkdir(parents=True, exist_ok=True)
        start, stop = (6 * i // self.parts for i in (self.index, self.index + 1))

        def make(names: Iterable[str]) -> Iterator[Made]:
            for name in names:
                taken = Path(self.meeting, f"{name} {self.index}")
                while self.index and not taken.exists():
                    time.sleep(0.001)
                bricks = taken.read_text() if self.index else ""
                if self.index == 0:
                    self.begin(name, out / "floors" / name)
                bricks += "".join(map(str, range(start, stop)))
                if self.index < self.parts - 1:
                    half = Path(self.meeting, f"half {name} {self.index + 1}")
                    half.write_text(bricks)
                    half.rename(half.with_name(f"{name} {self.index + 1}"))
                    continue
                (out / "floors" / name).write_text(bricks)
                yield name, [out / "floors" / name]

        return make


if __name__ == "__main__":
    from toy_units import Parts  # by the name that it has in a worker too

    out, workers, count, pause = sys.argv[1:]
    ledger = Path(out).parent / "ledger"
    ledger.mkdir(exist_ok=True)
    stage = Parts(count=int(count), ledger=str(ledger), pause=float(pause))
    with Crew(Processes(int(workers))) as crew:
        in_units(stage, Path(out), {}, crew.share)
