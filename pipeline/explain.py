"""Why a stage would run: what its recipe differs in from the closest artifact there is."""

import argparse
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from dirotq.errors import ArtifactError, ConfigError
from dirotq.pipeline.build import build
from dirotq.pipeline.compress import add_overrides
from dirotq.pipeline.config import compose_config
from dirotq.pipeline.differences import differences
from dirotq.pipeline.store import ArtifactStore, default_root
from dirotq.progress import begin


def add_explain(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb `explain`."""
    parser = add(
        _explain, "why each stage would run; `explain A B` compares two artifacts",
        "rank.r=32", "rank/1f3a rank/77c0",
        usage="dirotq explain [OVERRIDES ...]\n       dirotq explain A B [store=FOLDER]",
    )  # fmt: skip
    add_overrides(parser)


def _explain(options: argparse.Namespace) -> int:
    """Say why each stage would run, or compare two artifacts.

    What is named is the settings that differ, from the most similar artifact of the store.
    """
    words = options.overrides
    if any("=" not in word and not word.startswith(("~", "-", "+")) for word in words):
        return _compare(words)
    begin("reading the settings and the model")
    pipeline = build(compose_config(words, options.config))
    for step in pipeline.steps:
        if step.name in pipeline.force:
            print(f"{step.name} would run because of force")
        elif pipeline.store.get(step.name, step.fingerprint):
            print(f"{step.name} is cached: {step}")
        else:
            print(f"{step.name} would run because {reason(step.name, step.recipe, pipeline.store)}")
    return 0


def reason(stage: str, recipe: Mapping[str, Any], store: ArtifactStore) -> str:
    """Say what differs between ``recipe`` and the most similar artifact of the stage."""
    candidates = []
    for artifact in (a for a in store.list() if a.stage == stage):
        with contextlib.suppress(ArtifactError):  # damaged, or removed meanwhile: `verify` tells
            candidates.append((differences(artifact.manifest["recipe"], recipe), artifact))
    if not candidates:
        return "the store has no artifact of this stage"
    # Of equally many differences, own settings say more than changed inputs do; then the newest.
    changed, closest = min(
        reversed(candidates), key=lambda pair: (len(pair[0]), sum(map(_is_input, pair[0])))
    )
    return f"{_text(changed)} (against {closest})"


def _compare(words: list[str]) -> int:
    names = [word for word in words if not word.startswith("store=")]
    places = [word.partition("=")[2] for word in words if word.startswith("store=")]
    store = ArtifactStore([default_root(), *places][-1])
    if len(names) != 2:
        raise ConfigError(
            f"explain takes two artifacts or only overrides (name=value), found {' '.join(names)}"
        )
    one, other = (store.find(name) for name in names)
    changed = differences(one.manifest["recipe"], other.manifest["recipe"])
    print(f"{one} -> {other}: {_text(changed) or 'the same recipe'}")
    return 0


def _text(changed: Mapping[str, tuple[str, str]]) -> str:
    return ", ".join(
        f"{'its input changed:' if _is_input(name) else name} {old} -> {new}"
        for name, (old, new) in changed.items()
    )


def _is_input(name: str) -> bool:
    return name.startswith("input.")
