"""What stages took when they ran, as the provenance of their artifacts tells."""

import contextlib
import math
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dirotq.errors import ArtifactError
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.dag import Step


@dataclass(frozen=True, slots=True)
class Took:
    """One run of one stage: seconds, bytes of memory at its peak, bytes that it left.

    units    seconds of each of its units, in the order in which they are given out
    wall     seconds of making them all, a part of ``seconds``
    workers  that made them
    """

    seconds: float
    vram: int
    ram: int
    disk: int
    units: tuple[float, ...] = ()
    wall: float = 0.0
    workers: int = 1


def last_run_here(step: Step, past: Iterable[Artifact], machine: str | None) -> Took | None:
    """Find the last whole run of ``step``'s stage on its model and this machine; None without one.

    past     artifacts of any stage, by time of publication
    machine  name of the device, as ``estimate`` in provenance.json has it; None: any of this host

    A run that resumed what an interrupted one left took only a part of the stage's seconds.
    """
    found = None
    for artifact in (a for a in past if a.stage == step.name):
        match artifact.provenance:
            case {"host": host, "resumed": False, **more} if host == platform.node():
                on = more.get("estimate")
                here = machine is None or (isinstance(on, dict) and on.get("machine") == machine)
                with contextlib.suppress(ArtifactError):  # a damaged manifest
                    if here and _model(artifact.manifest["recipe"]) == _model(step.recipe):
                        found = took(artifact) or found
    return found


def took(artifact: Artifact) -> Took | None:
    """Return what its provenance tells; None if that is lost, damaged or nonsense."""
    match artifact.provenance:
        case {"seconds": int() | float() as seconds, "peak_rss_bytes": int() as ram, **more}:
            vram: Any = more.get("peak_vram_bytes", 0)
            sane = 0 <= seconds < math.inf and isinstance(vram, int) and min(ram, vram) >= 0
            with contextlib.suppress(ArtifactError):  # another recipe's, removed or damaged
                if sane:
                    return Took(seconds, vram, ram, artifact.bytes, *_units(seconds, more))
    return None


def _units(seconds: float, provenance: Any) -> tuple[tuple[float, ...], float, int]:
    """Return what it tells of units: seconds of each, of all, and workers; nothing if nonsense."""
    match provenance.get("units"), provenance.get("workers", [{}]):
        case {"seconds": list(each), "wall": int() | float() as wall}, list(workers):
            sane = all(isinstance(s, int | float) and 0 <= s < math.inf for s in each)
            if each and sane and 0 <= wall <= seconds:
                return tuple(each), wall, max(len(workers), 1)
    return (), 0.0, 1


def _model(recipe: Any) -> Any:
    """Return the stage's model, with the arguments it is called with."""
    return recipe["stage"].get("model")
