"""The graph of steps: every fingerprint is known before anything runs; then run what is missing."""

import graphlib
import inspect
import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from dirotq.errors import ConfigError
from dirotq.pipeline.stage import Stage, fingerprint, recipe
from dirotq.pipeline.store import Artifact, ArtifactStore

__all__ = ["Outcome", "Step", "plan", "run"]

log = logging.getLogger(__name__)

Wiring = Mapping[str, Mapping[str, str]]  # stage -> {input slot: stage that fills it}


@dataclass(frozen=True, slots=True)
class Step:
    """A stage in its place: which stage fills each input slot, and the recipe all this makes."""

    name: str
    stage: Stage
    needs: Mapping[str, str]
    recipe: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.recipe)

    def __str__(self) -> str:
        return f"{self.name}/{self.fingerprint}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The artifact of a step; ``seconds`` is None if it was there already."""

    artifact: Artifact
    seconds: float | None


def order(wiring: Wiring, until: str | None = None) -> list[str]:
    """Stage names in dependency order, as written where the wires leave a choice.

    With ``until``, only that stage and what it needs.

    Raises ConfigError for a cycle, or for a name that is no stage of the wiring.
    """
    for name in [until, *(need for needs in wiring.values() for need in needs.values())]:
        if name is not None and name not in wiring:
            raise ConfigError(f"{name!r} is no stage of this pipeline; it has {', '.join(wiring)}")
    graph = {name: set(needs.values()) for name, needs in wiring.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise ConfigError(f"the pipeline has a cycle: {' -> '.join(error.args[1])}") from error
    names: list[str] = []
    while len(names) < len(graph):  # as written, where the wires allow it
        names.append(next(n for n in graph if n not in names and graph[n] <= set(names)))
    if until is None:
        return names
    wanted = {until}
    for name in reversed(names):
        wanted |= graph[name] if name in wanted else set()
    return [name for name in names if name in wanted]


def plan(stages: Mapping[str, Stage], wiring: Wiring) -> list[Step]:
    """Steps in dependency order, each with its recipe. Touches neither the store nor a GPU.

    Raises ConfigError if a stage's input slots and its wiring differ.
    """
    steps: dict[str, Step] = {}
    for name in order({name: wiring[name] for name in stages}):
        stage, needs = stages[name], wiring[name]
        if not isinstance(stage, Stage):
            kind = type(stage).__name__
            raise ConfigError(f"{name}: a {kind} is no stage, it has no version or no run()")
        slots = {
            parameter.name
            for parameter in inspect.signature(stage.run).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
        if slots != set(needs):
            raise ConfigError(
                f"{name}: run() takes the inputs {sorted(slots)}, the pipeline wires "
                f"{sorted(needs)}; see conf/pipeline"
            )
        inputs = {slot: str(steps[need]) for slot, need in sorted(needs.items())}
        steps[name] = Step(name, stage, needs, {"stage": recipe(stage), "inputs": inputs})
    return list(steps.values())


def run(
    steps: Iterable[Step],
    store: ArtifactStore,
    executor: Executor,
    *,
    force: Collection[str] = (),
    overrides: Sequence[str] = (),
    estimates: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Outcome]:
    """Run, in order, every step whose artifact is not in the store.

    force      names of stages to recompute although their artifact exists
    estimates  {stage: what it was expected to take}, for provenance.json

    Raises KeyboardInterrupt with the step's name as its argument.
    """
    done: dict[str, Outcome] = {}
    estimates = estimates or {}
    for step in steps:
        inputs = {slot: done[need].artifact for slot, need in step.needs.items()}
        forced = step.name in force
        try:
            notes = {"estimate": estimates[step.name]} if step.name in estimates else {}
            job = executor.submit(_produce, step, store, inputs, forced, overrides, notes)
            done[step.name] = job.result()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(step.name) from None
    return done


def _produce(
    step: Step,
    store: ArtifactStore,
    inputs: Mapping[str, Artifact],
    force: bool,
    overrides: Sequence[str],
    notes: Mapping[str, Any],
) -> Outcome:
    if not force and (found := store.get(step.name, step.fingerprint)):
        log.info("%-8s cached  %s", step.name, step)
        return Outcome(found, None)
    resume = bool(getattr(step.stage, "resumable", False))
    with store.create(
        step.name, step.recipe, resume=resume, force=force, overrides=overrides, notes=notes
    ) as draft:
        began = time.monotonic()
        if computed := draft.artifact is None:
            log.info("%-8s running %s", step.name, step)
            draft.metrics.update(step.stage.run(draft.data, **inputs))
    assert draft.artifact is not None
    if not computed:
        log.info("%-8s taken from another process: %s", step.name, step)
        return Outcome(draft.artifact, None)
    seconds = time.monotonic() - began
    log.info("%-8s done in %.1f s", step.name, seconds)
    return Outcome(draft.artifact, seconds)
