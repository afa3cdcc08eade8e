"""``dirotq.compress``: all stages from Python, on a folder, a name or a pipeline in memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dirotq.errors import ConfigError
from dirotq.pipeline import compress as line
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.report import holding

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Compressed:
    """What :func:`compress` made.

    ``folder``     the packed model, for ``dirotq.load``; None if the run stopped before (``until``)
    ``report``     report.html; None likewise
    ``scores``     metrics of the packed model by name (psnr in dB, bits_per_parameter, ...)
    ``artifacts``  {stage: its artifact}
    """

    folder: Path | None
    report: Path | None
    scores: Mapping[str, float]
    artifacts: Mapping[str, Artifact] = field(repr=False)


def compress(
    model: "str | Path | DiffusionPipeline",
    *overrides: str,
    method: str | None = None,
    rank: int | str | None = None,
    device: str | None = None,
    store: str | Path | None = None,
    until: str | None = None,
) -> Compressed:
    """Run all stages, as ``dirotq compress`` does: what the store holds is not made again.

    model      a name of conf/model, a diffusers folder, a .safetensors file, a hub id; or a
               pipeline in memory, which is saved to DiRotQ's cache while it is read
    overrides  any other setting, as on the command line: "capture.calls=256"
    method     a name of conf/method
    rank       protected directions, or a name of conf/rank
    device     ``auto``, ``cpu``, ``cuda``, ``cuda:N``
    store      folder of the artifacts (default: DIROTQ_STORE, else ``artifacts`` here)
    until      the last stage to run

        made = dirotq.compress("folder", method="dirotq", rank=32)
        pipe = dirotq.load(made.folder)

    Raises DirotqError: ConfigError for what the arguments say, others for what the stages find.
    """
    chosen = {
        "method": method,
        "rank.r" if isinstance(rank, int) else "rank": rank,
        "device": device,
        "store": store,
        "until": until,
    }
    words = [f"{name}={value}" for name, value in chosen.items() if value is not None]
    if odd := [word for word in overrides if not isinstance(word, str)]:
        raise ConfigError(f"{odd[0]!r:.60} is no override; write text such as 'rank.r=32'")
    with _source(model) as source:
        artifacts = line.run([f"model={source}", *words, *overrides])
    scores: dict[str, float] = {}
    for artifact in artifacts.values():
        if artifact.stage in ("pack", "validate", "judge"):
            scores |= artifact.metrics
    made = list(artifacts.values())
    return Compressed(
        folder=holding(made, "model_index.json", folder=True),
        report=holding(made, "report.html"),
        scores=scores,
        artifacts=artifacts,
    )


@contextmanager
def _source(model: "str | Path | DiffusionPipeline") -> Iterator[str]:
    """Yield what ``model=`` takes."""
    if isinstance(model, str | Path):
        yield str(model).removeprefix("model=")
        return
    if not callable(getattr(model, "save_pretrained", None)) or not hasattr(model, "components"):
        raise ConfigError(
            f"{type(model).__name__} is no model that can be compressed: give a name of conf/model,"
            " a folder, a .safetensors file, a hub id, or a diffusers pipeline"
        )
    from dirotq.sources.saved import saved  # with torch

    with saved(model) as folder:
        yield str(folder)
