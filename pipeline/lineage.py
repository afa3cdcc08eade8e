"""What an artifact was made from, by the recipes that the store still holds."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dirotq.errors import ArtifactError
from dirotq.pipeline.artifact import Artifact

SHARED = ("model", "method")
"""Parts that several stages have alike: told once, without the stage's name."""
UNTOLD = ("class", "version")
_DIGEST = re.compile("[0-9a-f]{64}")


def lineage(artifacts: Iterable[Artifact]) -> dict[str, Artifact]:
    """Return {stage: artifact} of ``artifacts`` and of all that they were made from.

    What the store no longer holds, or holds damaged, is left out.
    """
    found: dict[str, Artifact] = {}
    waiting = list(artifacts)
    while waiting:
        one = waiting.pop(0)
        if one.stage in found:
            continue
        try:
            inputs = one.manifest["recipe"].get("inputs")
        except ArtifactError:
            continue
        found[one.stage] = one
        for name in inputs.values() if isinstance(inputs, dict) else ():
            stage, _, key = str(name).rpartition("/")
            waiting.append(Artifact(stage, key, one.path.parents[1] / stage / key))
    return found


def settings(artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Return {"rank.r": 16, "method.act_bits": 4, ...}, every setting that their recipes state."""
    found: dict[str, Any] = {}
    for stage, artifact in artifacts.items():
        found |= stage_settings(stage, artifact.manifest["recipe"].get("stage"))
    return dict(sorted(found.items()))


def stage_settings(stage: str, recipe: Any) -> dict[str, Any]:
    """Return the settings that the recipe of one stage states; of nothing else, none."""
    return {
        name if name.partition(".")[0] in SHARED else f"{stage}.{name}": value
        for name, value in _leaves(recipe if isinstance(recipe, dict) else {})
    }


def _leaves(node: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of what is no mapping, and no identity of content or code."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}.")
        elif name not in UNTOLD and not (isinstance(value, str) and _DIGEST.fullmatch(value)):
            yield f"{above}{name}", value
