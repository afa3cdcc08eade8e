"""Before anything runs: what each stage will need, and whether this machine can hold it.

A stage that can tell has ``needs(workload, machine) -> Needs``, a formula over shapes. Seconds are
told only of stages that ran here before (pipeline/history.py).
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dirotq.errors import ConfigError
from dirotq.files.digest import cache_root
from dirotq.pipeline import machine
from dirotq.pipeline.build import Pipeline
from dirotq.pipeline.disk import size_of
from dirotq.pipeline.machine import Machine, Needs
from dirotq.pipeline.settings import make

MARGIN = 1.05
"""Files of a run beside its artifacts: recorded calls, manifests, logs."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One stage that would run; ``present``: bytes that an interrupted run left, to resume from.

    A stage that can't tell has empty needs.
    """

    needs: Needs
    present: int = 0


@dataclass(frozen=True, slots=True)
class Preflight:
    """Estimates of stages that would run; ``machine`` is None if none was asked for.

    ``notes``  what the workload has to say of the model, a sentence each
    ``work``   what it says of how often the model is run; the second sentence, if any, advises less
    ``cache``  bytes that the model itself will take in DiRotQ's cache (single files, LoRAs)
    """

    machine: Machine | None = None
    estimates: dict[str, Estimate] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    work: tuple[str, ...] = ()
    cache: int = 0

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        """{stage: what is expected of it and where}, for provenance.json."""
        on = self.machine.name if self.machine else ""
        return {
            name: {"vram": e.needs.vram, "ram": e.needs.ram, "disk": e.needs.disk, "machine": on}
            for name, e in self.estimates.items()
        }


def examine(pipeline: Pipeline, cfg: DictConfig) -> Preflight:
    """Estimate every stage of ``pipeline`` that would run; nothing with ``preflight=false``.

    Touches no GPU. Raises ConfigError for a setting that contradicts the machine, and what the
    workload raises for a model that can't be read.
    """
    todo = pipeline.todo()
    telling = any(hasattr(step.stage, "needs") for step in todo)
    if not telling or not cfg.get("preflight") or "workload" not in cfg:
        return Preflight()
    here = machine.find(str(cfg.device))
    workload = make(cfg.workload, "workload")
    estimates = {}
    for step in todo:
        stage: Any = step.stage
        needs = stage.needs(workload, here) if hasattr(stage, "needs") else Needs()
        partial = pipeline.store.root / step.name / f"{step.fingerprint}.partial"
        present = size_of(partial) if getattr(stage, "resumable", False) else 0
        estimates[step.name] = Estimate(pipeline.executor.together(stage, needs), present)
    notes, cache = tuple(getattr(workload, "notes", ())), getattr(workload, "cache_bytes", 0)
    forwards = {k: v for e in estimates.values() for k, v in e.needs.forwards.items()}
    work = tuple(workload.told(forwards)) if forwards else ()
    return Preflight(here, estimates, notes, work, cache)


def refuse(found: Preflight, root: Path) -> None:
    """Raise ConfigError if the machine, or the disk of the store or the cache, is too small."""
    if found.machine is None:
        return
    problems = [*_memory(found.machine, found.estimates), *_disk(found, root)]
    if problems:
        raise ConfigError(
            "this run does not fit: " + "; ".join(problems) + ". These are estimates; "
            "preflight=false runs without them"
        )


def free_disk(root: Path) -> int:
    """Count the bytes free where the folder ``root`` is, or will be."""
    return shutil.disk_usage(_place(root)).free


def _memory(here: Machine, estimates: dict[str, Estimate]) -> list[str]:
    problems = []
    for name, estimate in estimates.items():
        needs = estimate.needs
        for needed, there, what in (
            (needs.vram, here.vram, f"of GPU memory and {here.name} has"),
            (needs.ram, here.ram, "of RAM and there are"),
        ):
            if needed > there:
                about = "up to" if needs.bound else "about"
                advice = f"; try {needs.lower}" if needs.lower else ""
                problems.append(
                    f"{name} needs {about} {_gb(needed)} {what} {_gb(there)}{advice}, or a larger "
                    "machine"
                )
    return problems


def _disk(found: Preflight, root: Path) -> Iterator[str]:
    needed = {name: max(e.needs.disk - e.present, 0) for name, e in found.estimates.items()}
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
    """Return the folder, or the innermost one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _gb(count: float) -> str:
    """In GB, or where that would be 0.0, in MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
