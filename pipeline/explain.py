"""Why a stage would run: what its recipe differs in from the closest artifact there is."""

import contextlib
from collections.abc import Mapping
from typing import Any

from dirotq.errors import ArtifactError, ConfigError
from dirotq.pipeline.config import build, compose_config
from dirotq.pipeline.differences import differences
from dirotq.pipeline.housekeeping import split_store
from dirotq.pipeline.store import Artifact, ArtifactStore

__all__ = ["command", "reason"]


def command(args: list[str], config: str) -> int:
    """``explain A B`` compares two artifacts, ``explain [overrides]`` looks at what would run."""
    names = [arg for arg in args if "=" not in arg and not arg.startswith(("~", "-", "+"))]
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
    candidates = []
    for artifact in known:
        with contextlib.suppress(ArtifactError):  # damaged, or removed meanwhile: `verify` tells
            candidates.append((differences(_recipe(artifact), recipe), artifact))
    if not candidates:
        return "the store has no artifact of this stage"
    # Of equally many differences, own settings say more than changed inputs do; then the newest.
    changed, closest = min(
        reversed(candidates), key=lambda pair: (len(pair[0]), sum(map(_is_input, pair[0])))
    )
    return f"{_text(changed)} (against {closest})"


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
