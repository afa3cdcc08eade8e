"""What a report says of itself: model, method, settings, command, versions, date."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.command import command
from dirotq.pipeline.lineage import lineage, settings
from dirotq.pipeline.provenance import git_revision, versions
from dirotq.sources.lora import parse_loras
from dirotq.sources.model import DiffusersModel
from dirotq.sources.origin import on_hub

SHOWN = ("dirotq", "torch", "triton", "diffusers", "transformers")


def about(
    model: DiffusersModel, inputs: Iterable[Artifact], own: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields of report.json that say what was measured and how it is made again.

    own  settings of the stage that writes the report, as its inputs' are named

    No path of this machine is told but those that the command was given.
    """
    made_from = lineage(inputs)
    said = settings(made_from)
    return {
        "model": model_name(model),
        "method": str(said.get("method.name", "unknown")),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command(),
        "settings": dict(sorted((said | dict(own)).items())),
        "fingerprints": {name: str(artifact) for name, artifact in sorted(made_from.items())},
        "versions": {k: v for k, v in versions().items() if k in SHOWN and v}
        | ({"commit": revision} if (revision := git_revision()) else {}),
    }


def model_name(model: DiffusersModel) -> str:
    """Name a model as people do: the hub's id or the last part of a path, and its LoRAs."""
    place = on_hub(model.path)
    name = place.id if place is not None else _last(model.path)
    loras = [f"{_last(lora.path)} x {lora.weight:g}" for lora in parse_loras(model.lora)]
    return " + ".join([name, *loras])


def _last(path: str) -> str:
    return Path(path.partition("://")[2] or path).name or path
