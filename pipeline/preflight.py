"""Before anything runs: what each stage will take, and whether this machine can hold it.

A stage that can tell has ``cost(workload, machine) -> Cost``; what it says is a formula over
shapes. Where a run of like size is in the store, made on this machine, the formula's seconds are
scaled by what that run took.
"""

import math
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dirotq.errors import ConfigError
from dirotq.files.digest import cache_root
from dirotq.pipeline import machine
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.config import Line
from dirotq.pipeline.cost import Cost, Machine
from dirotq.pipeline.dag import Step
from dirotq.pipeline.disk import size_of
from dirotq.pipeline.settings import make

__all__ = ["Estimate", "Preflight", "examine", "free_disk", "refuse"]

ALIKE = 5
"""Runs whose formulas differ by no more than this factor are of like size."""
MARGIN = 1.05
"""Files of a run beside its artifacts: recorded calls, manifests, logs."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One stage that would run.

    ``formula``  seconds before they were scaled by an earlier run
    ``present``  bytes that an interrupted run left, from which it resumes
    """

    cost: Cost
    formula: float
    present: int

    def record(self, on: str) -> dict[str, Any]:
        """For provenance.json: what was expected, to be held against what happened."""
        cost = asdict(self.cost)
        del cost["lower"]
        return cost | {"formula": self.formula, "machine": on, "resumed": self.present > 0}


@dataclass(frozen=True, slots=True)
class Preflight:
    """Estimates of stages that would run; ``machine`` is None if none was asked for.

    ``notes``  what the workload has to say of the model, a sentence each
    ``cache``  bytes that the model itself will take in DiRotQ's cache (single files, LoRAs)
    """

    machine: Machine | None = None
    estimates: dict[str, Estimate] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    cache: int = 0

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        """{stage: its record for provenance.json}."""
        on = self.machine.name if self.machine else ""
        return {name: estimate.record(on) for name, estimate in self.estimates.items()}


def examine(line: Line, cfg: DictConfig) -> Preflight:
    """Estimate every stage of ``line`` that would run; nothing with ``preflight=false``.

    Touches no GPU. Raises ConfigError for a setting that contradicts the machine, and what the
    workload raises for a model that can't be read.
    """
    todo = [step for step in line.steps if not line.cached(step)]
    telling: list[tuple[Step, Callable[[Any, Machine], Cost]]] = [
        (step, step.stage.cost) for step in todo if hasattr(step.stage, "cost")
    ]
    if not telling or not cfg.get("preflight") or "workload" not in cfg:
        return Preflight()
    here = machine.find(str(cfg.device))
    workload = make(cfg.workload, "workload")
    past = line.store.list()
    estimates = {}
    for step, tell in telling:
        cost = tell(workload, here)
        scale = _scale([a for a in past if a.stage == step.name], cost.seconds, here)
        partial = line.store.root / step.name / f"{step.fingerprint}.partial"
        present = size_of(partial) if getattr(step.stage, "resumable", False) else 0
        scaled = replace(cost, seconds=cost.seconds * scale)
        estimates[step.name] = Estimate(scaled, cost.seconds, present)
    notes = tuple(getattr(workload, "notes", ()))
    return Preflight(here, estimates, notes, cache=getattr(workload, "cache_bytes", 0))


def refuse(found: Preflight, root: Path) -> None:
    """Raise ConfigError if the machine, or the disk of the store ``root`` or of the cache, can't
    hold the run.
    """
    if found.machine is None:
        return
    problems = [*_memory(found.machine, found.estimates), *_disk(found, root)]
    if problems:
        raise ConfigError(
            "this run does not fit: " + "; ".join(problems) + ". These are estimates; "
            "preflight=false runs without them"
        )


def free_disk(root: Path) -> int:
    """Bytes free where the folder ``root`` is, or will be."""
    return shutil.disk_usage(_place(root)).free


def _memory(here: Machine, estimates: dict[str, Estimate]) -> list[str]:
    problems = []
    for name, estimate in estimates.items():
        cost = estimate.cost
        for needed, there, what in (
            (cost.vram, here.vram, f"of GPU memory and {here.name} has"),
            (cost.ram, here.ram, "of RAM and there are"),
        ):
            if needed > there:
                advice = f"; try {cost.lower}" if cost.lower else ""
                problems.append(
                    f"{name} needs about {_gb(needed)} {what} {_gb(there)}{advice}, or a larger "
                    "machine"
                )
    return problems


def _disk(found: Preflight, root: Path) -> Iterator[str]:
    needed = {name: max(e.cost.disk - e.present, 0) for name, e in found.estimates.items()}
    cache, elsewhere = cache_root(), 0
    if found.cache and _place(cache).stat().st_dev == _place(root).stat().st_dev:
        needed["the model in the cache"] = found.cache
    else:
        elsewhere = found.cache
    total, free = MARGIN * sum(needed.values()), free_disk(root)
    if total > free:
        most = sorted(needed, key=lambda name: -needed[name])[:2]
        parts = ", ".join(f"{name} {_gb(needed[name])}" for name in most)
        yield (
            f"it writes about {_gb(total)} ({parts}) and the disk of the store {root} has "
            f"{_gb(free)} free; give a store elsewhere (store=FOLDER) or make room (`dirotq gc` "
            "lists what may go)"
        )
    if elsewhere and MARGIN * elsewhere > (free := free_disk(cache)):
        yield (
            f"the model takes about {_gb(elsewhere)} in the cache {cache}, whose disk has "
            f"{_gb(free)} free; give a cache elsewhere (DIROTQ_CACHE=FOLDER) or make room (`dirotq "
            "gc --cache` lists what may go)"
        )


def _place(folder: Path) -> Path:
    """The folder, or the innermost one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _scale(past: Sequence[Artifact], formula: float, here: Machine) -> float:
    """What the latest run of like size took here, as a multiple of its formula; 1 without one.

    Provenance may be damaged or anybody's: what is no sane record is passed over.
    """
    for artifact in reversed(past):
        match artifact.provenance:
            case {
                "host": host,
                "seconds": int() | float() as seconds,
                "estimate": {
                    "machine": here.name,
                    "resumed": False,
                    "formula": int() | float() as then,
                },
            } if host == platform.node():
                alike = then > 0 and 1 / ALIKE <= then / max(formula, 1e-9) <= ALIKE
                if alike and 0 <= (scale := seconds / then) < math.inf:
                    return scale
    return 1.0


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
