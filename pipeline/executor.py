"""Where stages run: in this process, the units of divided ones in others if that is asked for."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from dirotq.errors import ConfigError
from dirotq.pipeline import early
from dirotq.pipeline.crew import Crew
from dirotq.pipeline.divided import Divided, Inputs, in_units
from dirotq.pipeline.machine import Needs, refuse_devices
from dirotq.pipeline.worker import Processes
from dirotq.pipeline.workplace import few_at_a_time

Notes = dict[str, Any]
RunStage = Callable[[Any, Path, Inputs, Notes], Mapping[str, float]]
"""Runs a stage on its inputs into a folder and returns its metrics; may add to provenance.json."""


class Executor(Protocol):
    """``opened`` gives what runs the stages of one run; what it started ends with the block.

    ``refuse`` raises ConfigError for a stage's ``device`` that contradicts the executor's;
    ``together`` makes of what a stage needs in one process what it needs of the machine.
    ``processes`` counts the workers (0: this process alone), and ``helping`` the units that one of
    ``idle`` ones is given of ``left``.
    """

    @property
    def processes(self) -> int: ...
    def helping(self, left: int, idle: int) -> int: ...
    def refuse(self, device: str, setting: str) -> None: ...

    def together(self, stage: Any, needs: Needs) -> Needs: ...
    def opened(self) -> contextlib.AbstractContextManager[RunStage]: ...


@dataclass(frozen=True, kw_only=True)
class LocalExecutor:
    """Runs stages on this machine.

    workers  processes that make the units of a divided stage, on the devices in turn; None: one per
             device, and without devices this process alone
    devices  GPUs, by their numbers, each for workers of its own; None: where ``device`` says

    Raises ConfigError for a device that isn't there or is named twice, and for no workers.
    """

    workers: int | None = None
    devices: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(
                f"executor.workers={self.workers}: use at least 1, or null for one per device"
            )
        if self.devices is None:
            return
        refuse_devices(self.devices)
        if self.workers is not None and self.workers % len(self.devices):
            raise ConfigError(
                f"executor.workers={self.workers} can't be shared out evenly to the "
                f"{len(self.devices)} of executor.devices={list(self.devices)}: use a multiple of "
                f"{len(self.devices)}, or leave executor.workers out"
            )

    @property
    def processes(self) -> int:
        """Processes beside this one; 0 if it works alone."""
        if self.devices is None:
            return self.workers if self.workers and self.workers > 1 else 0
        return self.workers or len(self.devices)

    def refuse(self, device: str, setting: str) -> None:
        """Raise ConfigError if the device of a stage is set beside ``devices``."""
        if self.devices is not None and device not in ("auto", "cuda"):
            raise ConfigError(
                f"{setting}={device} and executor.devices={list(self.devices)} both say where to "
                "compute: leave one of them out"
            )

    def together(self, stage: Any, needs: Needs) -> Needs:
        """Return what all processes need that make the stage's units."""
        if not self.processes or not isinstance(stage, Divided):
            return needs
        sharing = self.processes // len(self.devices or [0])
        return replace(needs, vram=needs.vram * sharing, ram=needs.ram * self.processes)

    def helping(self, left: int, idle: int) -> int:
        """Count the units that one of the processes is given."""
        return few_at_a_time(left, self.processes)

    def start_early(self) -> None:
        """Begin to start the processes, for a run inside of the same ``early.block``."""
        if self.processes:
            early.start(Processes(self.processes, self.devices))

    @contextlib.contextmanager
    def opened(self) -> Iterator[RunStage]:
        """Yield what runs a stage. Other processes start when a stage first has units for them,
        if they were not started earlier (pipeline/early.py)."""
        if not self.processes:
            yield run_here
            return
        with Crew(Processes(self.processes, self.devices, early.started())) as crew:
            first = None if self.devices is None else f"cuda:{self.devices[0]}"
            yield partial(run_shared, crew, first)


def run_here(stage: Any, out: Path, inputs: Inputs, notes: Notes) -> Mapping[str, float]:
    """Run a stage in this process."""
    metrics: Mapping[str, float] = stage.run(out, **inputs)
    return metrics


def run_shared(
    crew: Crew, device: str | None, stage: Any, out: Path, inputs: Inputs, notes: Notes
) -> Mapping[str, float]:
    """Run a stage, its units in other processes; on ``device`` what remains for this one."""
    if device is not None and hasattr(stage, "device"):
        stage = replace(stage, device=device)
    if not isinstance(stage, Divided):
        return run_here(stage, out, inputs, notes)
    crew.peaks.clear()
    metrics = in_units(stage, out, inputs, crew.share, crew.chain)
    notes["workers"] = list(crew.peaks.values())
    return metrics
