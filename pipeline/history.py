"""What stages took when they ran, as the provenance of their artifacts tells."""

import contextlib
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dirotq.errors import ArtifactError
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.dag import Step

__all__ = ["Took", "last_run_here", "took"]


@dataclass(frozen=True, slots=True)
class Took:
    """One run of one stage: seconds, bytes of memory at its peak, bytes that it left."""

    seconds: float
    vram: int
    ram: int
    disk: int


def last_run_here(step: Step, past: Iterable[Artifact], machine: str | None) -> Took | None:
    """The latest whole run of ``step``'s stage on its model and on this machine; None without one.

    past     artifacts of any stage, by time of publication
    machine  name of the device, as ``estimate`` in provenance.json has it; None: any of this host

    A run that resumed what an interrupted one left took only a part of the stage's seconds.
    """
    found = None
    for artifact in past:
        made = artifact.provenance
        match made if isinstance(made, Mapping) else {}:
            case {"host": str() as host, "resumed": False, **more}:
                here = host == platform.node() and machine in (None, _machine(more))
                if here and artifact.stage == step.name and _model(artifact) == _of(step.recipe):
                    found = took(artifact) or found
    return found


def took(artifact: Artifact) -> Took | None:
    """What its provenance tells; None if that is lost, damaged or nonsense."""
    match artifact.provenance:
        case {"seconds": int() | float() as seconds, "peak_rss_bytes": int() as ram, **more}:
            vram: Any = more.get("peak_vram_bytes", 0)
            sane = 0 <= seconds < math.inf and isinstance(vram, int) and min(ram, vram) >= 0
            with contextlib.suppress(ArtifactError):  # another recipe's, removed or damaged
                if sane:
                    return Took(seconds, vram, ram, artifact.bytes)
    return None


def _machine(provenance: Mapping[str, Any]) -> Any:
    estimate = provenance.get("estimate")
    return estimate.get("machine") if isinstance(estimate, Mapping) else None


def _model(artifact: Artifact) -> Any:
    """The model in an artifact's recipe, with the arguments it is called with."""
    with contextlib.suppress(ArtifactError):
        return _of(artifact.manifest["recipe"])
    return artifact  # equal to no model


def _of(recipe: Mapping[str, Any]) -> Any:
    stage = recipe.get("stage")
    return stage.get("model") if isinstance(stage, Mapping) else None
