"""The runs to compare: which ones are meant, and what `validate` measured of each."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dirotq.errors import ArtifactError
from dirotq.evaluate.statistics import Interval
from dirotq.evaluate.web import plain
from dirotq.pipeline import runs as records
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.lineage import lineage, settings
from dirotq.pipeline.store import ArtifactStore

VALIDATE = "validate"
NAMED = 4
"""Settings that a run's name tells; the others are in its report."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one report says.

    ``name``     validate/FINGERPRINT
    ``source``   identity of the 16-bit model and of how it was called
    ``prompts``  (text, seed) of each image; ``psnr_N`` their scores
    ``psnr``, ``ssim``  means over the prompts
    ``seconds``  per image, on ``device``
    ``level``, ``verdict``  of the report; empty in those of older versions
    """

    name: str
    model: str
    method: str
    date: str
    source: str
    settings: Mapping[str, Any]
    prompts: tuple[tuple[str, int], ...]
    psnr_N: tuple[float, ...]
    psnr: Interval
    ssim: Interval
    bits: float
    bytes: int
    original: int
    seconds: float
    device: str
    level: str
    verdict: str

    @property
    def on_cpu(self) -> bool:
        """Whether its time is that of the CPU's reference path."""
        return "reference path" in self.device


def read_runs(store: ArtifactStore, names: Sequence[str]) -> tuple[list[Run], list[str]]:
    """Return the runs that ``names`` mean (none: all of the store), the best first, and notes about
    what is not among them.

    Raises ArtifactError for a name that means nothing, or if no run is left.
    """
    chosen, notes = _chosen(store, names)
    found = []
    for artifact in chosen:
        try:
            found.append(_read(artifact))
        except ArtifactError as error:
            notes.append(f"{artifact} is left out: {error}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            notes.append(
                f"{artifact} is left out: its report.json has another shape ({error!r:.60}); "
                "force=[validate] writes it anew"
            )
    if not found:
        raise ArtifactError(
            f"there is nothing to compare in {store.root}: "
            + ("; ".join(notes) or "no run has reached `validate` yet")
            + ". `dirotq compress` makes runs; a store elsewhere is named with store=FOLDER"
        )
    return sorted(found, key=lambda run: (run.model, -run.psnr.mean, run.name)), notes


def labels(runs: Sequence[Run]) -> dict[str, str]:
    """Return {name: method and the settings in which runs of one model and method differ}."""
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.model, run.method].append(run)
    found = {}
    for alike in groups.values():
        keys = sorted({key for run in alike for key in run.settings})
        apart = [k for k in keys if len({plain(run.settings.get(k)) for run in alike}) > 1]
        for run in alike:
            said = [f"{key}={plain(run.settings.get(key))}" for key in apart[:NAMED]]
            more = [f"and {len(apart) - NAMED} more"] if len(apart) > NAMED else []
            found[run.name] = ", ".join([run.method, *said, *more])
    return found


def _chosen(store: ArtifactStore, names: Sequence[str]) -> tuple[list[Artifact], list[str]]:
    measured = {str(a): a for a in store.list() if a.stage == VALIDATE}
    notes: list[str] = []
    if not names:
        stopped = [p.name for p in store.leftovers() if p.parent.name == VALIDATE]
        if stopped:
            notes.append(
                f"interrupted before they were measured, and left out: {', '.join(stopped)}; the "
                "same command goes on with them"
            )
        return list(measured.values()), notes
    chosen: dict[str, Artifact] = {}
    for name in names:
        found, said = _meant(store, name, measured)
        chosen |= {str(artifact): artifact for artifact in found}
        notes += said
    return list(chosen.values()), notes


def _meant(
    store: ArtifactStore, name: str, measured: Mapping[str, Artifact]
) -> tuple[list[Artifact], list[str]]:
    """Return the measured artifacts that one word means, and notes."""
    folder = _folder(store, name)
    if folder is not None and (listed := records.recorded(folder)):
        notes, found = [], []
        for record, artifacts in listed.items():
            ours = [measured[a] for a in sorted(artifacts) if a in measured]
            found += ours
            if not ours:
                notes.append(f"the run {record.parent} was interrupted, or stopped on purpose, "
                             f"before it was measured, and is left out")  # fmt: skip
        return found, notes
    if folder is not None and folder.is_relative_to(store.root):
        name = "/".join(folder.relative_to(store.root).parts[:2])
    artifact = store.find(name)
    if artifact.stage == VALIDATE:
        return [artifact], []
    found = [m for m in measured.values() if artifact in lineage([m]).values()]
    if not found:
        raise ArtifactError(
            f"nothing was measured of {artifact}: no run has gone on from it to `validate`"
        )
    return found, []


def _folder(store: ArtifactStore, name: str) -> Path | None:
    """Return the folder that ``name`` is a path of, or the name of a run of the store."""
    for place in (Path(name).expanduser(), store.root / "runs" / name):
        try:
            if name and place.is_dir():
                return place.resolve()
        except (OSError, ValueError):  # longer than a path may be, a NUL
            continue
    return None


def _read(artifact: Artifact) -> Run:
    report = json.loads(artifact.file("report.json").read_text(encoding="utf-8"))
    made_from = lineage([artifact])
    said = settings(made_from)
    recipe = artifact.manifest["recipe"].get("stage", {})
    scores, images, size = report["scores"], report["images"], report["bytes"]
    verdict = report.get("verdict", {"level": "", "headline": ""})
    if not images or min(size["total"], size["original"]) < 1:
        raise ValueError("no images, or no bytes")
    return Run(
        name=str(artifact),
        model=str(report.get("model", "model without a name")),
        method=str(report.get("method", said.get("method.name", "unknown"))),
        date=str(report.get("date", artifact.provenance.get("started", ""))),
        source=json.dumps(recipe.get("model"), sort_keys=True),
        settings=said,
        prompts=tuple((str(image["prompt"]), int(image["seed"])) for image in images),
        psnr_N=tuple(_finite(image["psnr"]) for image in images),
        psnr=_interval(scores["psnr"]["packed"]),
        ssim=_interval(scores["ssim"]["packed"]),
        bits=_finite(report["bits_per_parameter"]),
        bytes=int(size["total"]),
        original=int(size["original"]),
        seconds=_finite(report["seconds_per_image"]["packed"]),
        device=str(report["devices"]["packed"]),
        level=str(verdict["level"]),
        verdict=str(verdict["headline"]),
    )


def _interval(found: Mapping[str, float]) -> Interval:
    return Interval(*(_finite(found[end]) for end in ("mean", "low", "high")))


def _finite(value: Any) -> float:
    number = float(value)
    if number - number != 0:  # infinite, or no number
        raise ValueError(f"{value} is not finite")
    return number


def sources(runs: Iterable[Run]) -> dict[tuple[str, tuple[tuple[str, int], ...]], list[Run]]:
    """Return runs by what they may be compared over: one 16-bit model, the same prompts."""
    groups: dict[tuple[str, tuple[tuple[str, int], ...]], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.source, run.prompts].append(run)
    return groups
