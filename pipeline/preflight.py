"""Before anything runs: what each stage will take, and whether this machine can hold it.

A stage that can tell has ``cost(workload, machine) -> Cost``; what it says is a formula over
shapes. Where a run of like size is in the store, made on this machine, the formula's seconds are
scaled by what that run took.
"""

import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from dirotq.cost import Cost, Machine
from dirotq.errors import ConfigError
from dirotq.pipeline import machine
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.config import Line
from dirotq.pipeline.dag import Step

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
    """

    machine: Machine | None = None
    estimates: dict[str, Estimate] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

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
    todo = [s for s in line.steps if s.name in line.force or not _cached(line, s)]
    telling: list[tuple[Step, Callable[[Any, Machine], Cost]]] = [
        (step, step.stage.cost) for step in todo if hasattr(step.stage, "cost")
    ]
    if not telling or not cfg.get("preflight") or "workload" not in cfg:
        return Preflight()
    here = machine.find(str(cfg.device))
    workload = instantiate(cfg.workload, _convert_="all")
    past = line.store.list()
    estimates = {}
    for step, tell in telling:
        cost = tell(workload, here)
        scale = _scale([a for a in past if a.stage == step.name], cost.seconds, here)
        partial = line.store.root / step.name / f"{step.fingerprint}.partial"
        present = _size(partial) if getattr(step.stage, "resumable", False) else 0
        scaled = replace(cost, seconds=cost.seconds * scale)
        estimates[step.name] = Estimate(scaled, cost.seconds, present)
    return Preflight(here, estimates, tuple(getattr(workload, "notes", ())))


def refuse(found: Preflight, root: Path) -> None:
    """Raise ConfigError if the machine or the disk of the store ``root`` can't hold the run."""
    if found.machine is None:
        return
    problems = [*_memory(found.machine, found.estimates), *_disk(found.estimates, root)]
    if problems:
        raise ConfigError(
            "this run does not fit: " + "; ".join(problems) + ". These are estimates; "
            "preflight=false runs without them"
        )


def free_disk(root: Path) -> int:
    """Bytes free where the folder ``root`` is, or will be."""
    place = next(path for path in (root, *root.parents) if path.exists())
    return shutil.disk_usage(place).free


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


def _disk(estimates: dict[str, Estimate], root: Path) -> list[str]:
    needed = {name: max(e.cost.disk - e.present, 0) for name, e in estimates.items()}
    total, free = MARGIN * sum(needed.values()), free_disk(root)
    if total <= free:
        return []
    most = sorted(needed, key=lambda name: -needed[name])[:2]
    parts = ", ".join(f"{name} {_gb(needed[name])}" for name in most)
    return [
        f"it writes about {_gb(total)} ({parts}) and the disk of the store {root} has {_gb(free)} "
        "free; give a store elsewhere (store=FOLDER) or make room (`dirotq gc` lists what may go)"
    ]


def _cached(line: Line, step: Step) -> bool:
    return line.store.get(step.name, step.fingerprint) is not None


def _scale(past: Sequence[Artifact], formula: float, here: Machine) -> float:
    """What the latest run of like size took here, as a multiple of its formula; 1 without one."""
    for artifact in reversed(past):
        made = artifact.provenance
        then = made.get("estimate") or {}
        if (
            made.get("host") == platform.node()
            and then.get("machine") == here.name
            and not then["resumed"]
            and 1 / ALIKE <= then["formula"] / max(formula, 1e-9) <= ALIKE
        ):
            return float(made["seconds"]) / float(then["formula"])
    return 1.0


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
