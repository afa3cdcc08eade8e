"""Why a stage would run: what its recipe differs in from the closest artifact there is."""

from collections.abc import Iterator, Mapping
from typing import Any

from dirotq.errors import ConfigError
from dirotq.pipeline.config import build, compose_config
from dirotq.pipeline.housekeeping import split_store
from dirotq.pipeline.store import Artifact, ArtifactStore

__all__ = ["command", "differences", "reason"]

_SHORT = {"stage": "recipe", "inputs": "input"}  # what people read for the two halves of a recipe


def command(args: list[str], config: str) -> int:
    """``explain A B`` compares two artifacts, ``explain [overrides]`` looks at what would run."""
    names = [arg for arg in args if "=" not in arg and arg[0] not in "~-+"]
    if names:
        return _compare(args)
    line = build(compose_config(args, config))
    for step in line.steps:
        if step.name in line.force:
            print(f"{step.name} would run because of force")
        elif line.store.get(step.name, step.fingerprint):
            print(f"{step.name} is cached: {step}")
        else:
            print(f"{step.name} would run because {reason(step.name, step.recipe, line.store)}")
    return 0


def reason(stage: str, recipe: Mapping[str, Any], store: ArtifactStore) -> str:
    """What differs between ``recipe`` and the most similar artifact of the stage."""
    known = [artifact for artifact in store.list() if artifact.stage == stage]
    if not known:
        return "the store has no artifact of this stage"
    candidates = [(differences(_recipe(artifact), recipe), artifact) for artifact in known]
    # Of equally many differences, own settings say more than changed inputs do; then the newest.
    changed, closest = min(
        reversed(candidates), key=lambda pair: (len(pair[0]), sum(map(_is_input, pair[0])))
    )
    return f"{_text(changed)} (against {closest})"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """{dotted name: (old, new)} of every leaf in which two recipes differ."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    names = [*before, *(name for name in after if name not in before)]
    pairs = {name: (before.get(name, "(absent)"), after.get(name, "(absent)")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _compare(args: list[str]) -> int:
    names, store = split_store(args)
    if len(names) != 2:
        raise ConfigError(
            f"explain takes two artifacts or only overrides (name=value), found {' '.join(names)}"
        )
    one, other = (store.find(name) for name in names)
    changed = differences(_recipe(one), _recipe(other))
    print(f"{one} -> {other}: {_text(changed) or 'the same recipe'}")
    return 0


def _recipe(artifact: Artifact) -> Mapping[str, Any]:
    recipe: Mapping[str, Any] = artifact.manifest["recipe"]
    return recipe


def _text(changed: Mapping[str, tuple[str, str]]) -> str:
    return ", ".join(
        f"{'its input changed:' if _is_input(name) else name} {old} -> {new}"
        for name, (old, new) in changed.items()
    )


def _is_input(name: str) -> bool:
    return name.startswith("input.")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of nested recipes; a stage's own fields are called recipe.<field>."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            path = f"{name}.{key}" if name else _SHORT.get(str(key), str(key))
            yield from _leaves(inner, path)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{name}[{index}]")
    else:
        yield name, str(value)
