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
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from dirotq.errors import NumericalError
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.crew import Crew
from dirotq.pipeline.divided import Make, in_units
from dirotq.pipeline.stage import untracked
from dirotq.pipeline.units import Made, Units
from dirotq.pipeline.worker import Processes

log = logging.getLogger(__name__)


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
                first = not self.begun(name)
                Path(self.ledger, f"{name} {os.getpid()} {uuid.uuid4().hex}").touch()
                harm = self.harm.get(name, "")
                if harm == "die" or (harm == "die once" and first):
                    (out / "parts" / name).write_text("half")
                    os.kill(os.getpid(), signal.SIGKILL)
                if harm == "fail":
                    raise NumericalError(f"{name}: not finite")
                time.sleep(self.pause)
                (out / "parts" / name).write_text(f"content of {name}")
                yield name, [out / "parts" / name]

        return make

    def merge(self, units: Units) -> Mapping[str, float]:
        parts = [units.out / "parts" / name for name in self.units()]
        (units.out / "all").write_text("\n".join(part.read_text() for part in parts))
        return {"parts": len(parts)}

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


if __name__ == "__main__":
    from toy_units import Parts  # by the name that it has in a worker too

    out, workers, count, pause = sys.argv[1:]
    ledger = Path(out).parent / "ledger"
    ledger.mkdir(exist_ok=True)
    stage = Parts(count=int(count), ledger=str(ledger), pause=float(pause))
    with Crew(Processes(int(workers))) as crew:
        in_units(stage, Path(out), {}, crew.share)
