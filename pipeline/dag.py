"""The graph of steps: every fingerprint is known before anything runs; then run what is missing."""

import contextlib
import functools
import graphlib
import inspect
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dirotq.errors import ArtifactError, ConfigError, DirotqError
from dirotq.pipeline.command import running
from dirotq.pipeline.differences import differences
from dirotq.pipeline.executor import Executor, RunStage
from dirotq.pipeline.stage import Stage, fingerprint, recipe
from dirotq.pipeline.store import Artifact, ArtifactStore

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
    """Return stage names in dependency order, as written where the wires leave a choice.

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
    """Return steps in dependency order, each with its recipe. Touches neither the store nor a GPU.

    Raises ConfigError if a stage's input slots and its wiring differ. A slot to which ``run`` gives
    a default may stay unwired.
    """
    steps: dict[str, Step] = {}
    for name in order({name: wiring[name] for name in stages}):
        stage, needs = stages[name], wiring[name]
        if not isinstance(stage, Stage):
            kind = type(stage).__name__
            raise ConfigError(f"{name}: a {kind} is no stage, it has no version or no run()")
        parameters = inspect.signature(stage.run).parameters.values()
        slots = {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}
        if not {slot for slot, needed in slots.items() if needed} <= set(needs) <= set(slots):
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
    finished: Callable[[Artifact], None] = lambda artifact: None,
) -> dict[str, Outcome]:
    """Run, in order, every step whose artifact is not in the store.

    Until the last step ends, no other process can replace or remove an artifact of an earlier one.

    force      names of stages to recompute although their artifact exists
    estimates  {stage: what it was expected to take}, for provenance.json
    finished   is given each artifact once it is there, made or found

    Raises KeyboardInterrupt with the step's name as its argument, and ArtifactError if what a step
    reads is no longer what its recipe says.
    """
    done: dict[str, Outcome] = {}
    estimates = estimates or {}
    with contextlib.ExitStack() as held, executor.opened() as run_stage:
        for step in steps:
            inputs = {slot: done[need].artifact for slot, need in step.needs.items()}
            forced = step.name in force
            notes: dict[str, Any] = {}
            if step.name in estimates:
                notes["estimate"] = estimates[step.name]
            produce = functools.partial(
                _produce, step, store, run_stage, inputs, forced, overrides, notes
            )
            try:
                done[step.name] = _obtain(step, store, held, produce, forced)
                finished(done[step.name].artifact)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(step.name) from None
            except Exception as error:
                error.add_note(f"in stage {step.name}")  # pipeline/faults.py tells it
                raise
    return done


def _obtain(
    step: Step,
    store: ArtifactStore,
    held: contextlib.ExitStack,
    produce: Callable[[], float | None],
    force: bool,
) -> Outcome:
    """Get the step's artifact, made where it is missing; ``held`` keeps it from other processes.

    Between its publication and that, nobody holds it: if it is gone by then, it is made again.
    """
    started, seconds = False, None
    while True:
        with contextlib.ExitStack() as attempt:
            if started or not force:
                artifact = attempt.enter_context(store.reading(step.name, step.fingerprint))
                if artifact and artifact.manifest:  # damage shows now, not when all has run
                    held.enter_context(attempt.pop_all())
                    if not started:
                        log.info("%-8s cached  %s", step.name, step)
                    return Outcome(artifact, seconds)
        started, seconds = True, produce()


def _produce(
    step: Step,
    store: ArtifactStore,
    run_stage: RunStage,
    inputs: Mapping[str, Artifact],
    force: bool,
    overrides: Sequence[str],
    notes: dict[str, Any],
) -> float | None:
    """Run the step and publish what it makes; its seconds, or None if another process did."""
    resume = bool(getattr(step.stage, "resumable", False))
    with store.create(
        step.name, step.recipe, resume=resume, force=force, overrides=overrides, notes=notes
    ) as draft:
        if draft.artifact:
            log.info("%-8s taken from %s: %s", step.name, draft.source, step)
            return None
        began = time.monotonic()
        log.info("%-8s running %s", step.name, step)
        discard = functools.partial(store.discard, draft.data.parent)
        with running(overrides), _unmixed(step, inputs, discard):
            draft.metrics.update(run_stage(step.stage, draft.data, inputs, notes))
    seconds = time.monotonic() - began
    log.info("%-8s done in %.1f s", step.name, seconds)
    return seconds


@contextlib.contextmanager
def _unmixed(
    step: Step, inputs: Mapping[str, Artifact], discard: Callable[[], None]
) -> Iterator[None]:
    """Let the block run, and keep what it made, only if all it reads is what the recipe says.

    A run of hours reads its model and its prompts long after they were fingerprinted. Both looks
    cost no more than the files' times where nothing changed.
    """
    if changed := _changed(step, inputs):
        raise ArtifactError(
            f"{step} was not run: what it reads changed since this run was planned: {changed}. "
            "The same command plans anew"
        )
    try:
        yield
    except BaseException:
        if changed := _changed(step, inputs):
            log.warning("%s: what it reads changed: %s; its work is dropped", step, changed)
            discard()
        raise
    if changed := _changed(step, inputs):
        discard()
        raise ArtifactError(
            f"{step}: what it reads changed while it ran: {changed}. Nothing was published, and "
            "what was made of mixed inputs was removed. Leave models, prompts and the store alone "
            "while they are read; the same command plans anew"
        )


def _changed(step: Step, inputs: Mapping[str, Artifact]) -> str:
    """Say what a step reads otherwise than its recipe says; empty if nothing."""
    try:
        now = recipe(step.stage)
        for artifact in inputs.values():
            artifact.recheck()
    except (DirotqError, OSError) as error:
        return str(error)
    found = differences({"stage": step.recipe["stage"]}, {"stage": now})
    told = [f"{name} ({old:.12} -> {new:.12})" for name, (old, new) in found.items()]
    return ", ".join(told[:4]) + (f" and {len(told) - 4} more" if told[4:] else "")
