"""Quality, size and speed of exactly the folder that ``pack`` wrote, through the public loader."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from dirotq.device import choose_dtype, dtype_name, pick_device, refuse_dtype, release
from dirotq.errors import ArtifactError, ConfigError
from dirotq.evaluate.about import about
from dirotq.evaluate.attribute_judge import AttributeJudge
from dirotq.evaluate.images import (
    ImageWriter,
    generate_all,
    has_images,
    made_in,
    made_on,
    read_images,
    read_seconds,
    typical_seconds,
)
from dirotq.evaluate.metrics import Metric
from dirotq.evaluate.report import worst_first, write_pairs, write_report
from dirotq.evaluate.scoring import (
    ENCODERS,
    FLOOR,
    ORIGINAL,
    PACKED,
    ImageSets,
    Scores,
    score,
    stills,
)
from dirotq.evaluate.text_encoders import embedding_errors, encoded
from dirotq.evaluate.verdict import verdict
from dirotq.loading import load_denoisers, load_to_run
from dirotq.packed.text_encoders import load_encoders, packed_encoders
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.lineage import stage_settings
from dirotq.pipeline.stage import recipe, untracked
from dirotq.pipeline.units import Units
from dirotq.quantize import memory
from dirotq.quantize.drawing import choose_here, drawn_on
from dirotq.quantize.moments import Captured
from dirotq.quantize.packed_network import describe
from dirotq.quantize.plan import SitePlan, read_plan
from dirotq.quantize.planning import read_spectrum
from dirotq.quantize.running import of_folder
from dirotq.quantize.uncalibrated import advice
from dirotq.sources.model import DiffusersModel
from dirotq.sources.prompts import PromptSet, refuse_shared


@dataclass(frozen=True, kw_only=True)
class Validate:
    """Compare the packed pipeline with the 16-bit one on held-out prompts.

    ``calibration``  the prompts that calibrated, none of which may be among ``prompts``
    ``reader``   judge of captioned attributes, or None
    ``learned``  metrics that need weights, by the name they have in the report (dirotq/metrics)
    ``batch``    prompts per pipeline call; each prompt has its own seed, so it changes no image
                 beyond rounding; one batch is the unit of resuming
    ``pairs``    image pairs shown in the report, those of the worst prompts
    ``dtype``    of everything that isn't packed; has to be that of the reference images

    Without ``capture`` and ``basis`` (pipeline=instant) sites are listed, but not measured: no
    inputs of theirs are known.

    Where text encoders are packed, images with them alone packed are made too (``encoders``).

    Writes ``images.zarr`` with the array ``packed`` (dirotq/evaluate/images.py), ``report.json``
    (every number, per image and per site; what was measured and by which command),
    ``report.html`` (one file, nothing to fetch) and ``pairs.png`` (of the first prompts).
    """

    version: ClassVar[str] = "4"
    resumable: ClassVar[bool] = True
    needs = memory.validate

    model: DiffusersModel
    prompts: PromptSet
    calibration: PromptSet = untracked()  # noqa: RUF009 (a field without a default)
    reader: AttributeJudge | None
    learned: Mapping[str, Metric]
    batch: int
    pairs: int
    dtype: str
    device: str = untracked()

    def __post_init__(self) -> None:
        refuse_dtype(self.dtype)
        if self.batch < 1 or self.pairs < 0:
            raise ConfigError(
                f"validate.batch={self.batch}, validate.pairs={self.pairs}: use at least 1 and 0"
            )

    def check(self) -> None:
        """Raise ConfigError before anything runs if a held-out prompt calibrates too, or a learned
        metric lacks its package or weights.
        """
        refuse_shared(self.calibration.load(), self.prompts.load())
        if self.reader is not None:
            self.reader.refuse_silent(self.prompts.load())
        for metric in self.learned.values():
            metric.check()

    def run(
        self,
        out: Path,
        *,
        rank: Artifact,
        pack: Artifact,
        reference: Artifact,
        capture: Artifact | None = None,
        basis: Artifact | None = None,
    ) -> Mapping[str, float]:
        device = pick_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        plan, sets = read_plan(rank.file("plan.json")), _sets(self, out, reference)
        _refuse_other_dtype(reference, dtype)
        tree, units = out / "images.zarr", Units(out, self)

        resumed = _draw_packed(self, pack, plan, tree, units, device, dtype)
        denoisers = load_denoisers(pack.tree("model"), dtype)
        known = None if capture is None else Captured(capture)
        network = describe(self.model, denoisers, plan, known, device)
        del denoisers
        embeddings = _text_encoders(self, pack, tree, units, device, dtype)
        if has_images(tree, ENCODERS):
            sets = replace(sets, places={**sets.places, ENCODERS: (tree, ENCODERS)})

        prompts = self.prompts.load()
        scores = score(sets, prompts, self.reader, self.learned, device)
        images, table = scores.rows(prompts), scores.table()
        inputs = [one for one in (capture, basis, rank, pack, reference) if one is not None]
        judged = verdict(images, table)
        if capture is None:
            judged["reasons"].append(advice())
        report = about(self.model, inputs, stage_settings("validate", recipe(self))) | {
            "verdict": judged,
            "resumed": resumed,
            "images": images,
            "scores": table,
            "attributes": scores.attributes or None,
            **network,
            "text_encoders": embeddings,
            "running": of_folder(pack.tree("model")).reported(),
            **_made(sets),
            "inputs": {a.stage: str(a) for a in inputs},
        }
        report["metrics"] = _headline(report, scores)
        _write(self, out, report, _spectra(plan, basis), sets)
        return report["metrics"]


def _draw_packed(
    stage: Validate,
    pack: Artifact,
    plan: list[SitePlan],
    tree: Path,
    units: Units,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """Make the packed pipeline's images; return how many an interrupted run had left."""
    folder = pack.tree("model")
    weight = max(entry.spec.outputs * entry.spec.in_features for entry in plan)
    way = choose_here(stage.model, stage.batch, dtype, device, folder, weight)
    where = "CPU, reference path" if device.type == "cpu" else drawn_on(device, way)
    pipe = load_to_run(folder, way, device, dtype)
    resumed = _draw(stage, pipe, tree, PACKED, units, where, dtype, "packed images")
    del pipe
    release(device)
    return resumed


def _draw(
    stage: Validate,
    pipe: Any,
    tree: Path,
    name: str,
    units: Units,
    where: str,
    dtype: torch.dtype,
    what: str,
) -> int:
    """Make a pipeline's images of all prompts; return how many were there."""
    prompts, call = stage.prompts.load(), stage.model.sample_arguments()
    writer = ImageWriter(
        tree, name, len(prompts), device=where, dtype=dtype_name(dtype), units=units
    )
    there = len(prompts) - sum(map(len, writer.missing(stage.batch)))
    generate_all(writer, pipe, prompts, call, stage.batch, what)
    return there


def _text_encoders(
    stage: Validate,
    pack: Artifact,
    tree: Path,
    units: Units,
    device: torch.device,
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    """Measure what packed text encoders do to embeddings, and make images with them alone packed.

    Returns the rows of :func:`embedding_errors`; none where all encoders are in 16 bits.
    """
    folder = pack.tree("model")
    if not (names := packed_encoders(folder)):
        return []
    prompts, call = stage.prompts.load(), stage.model.sample_arguments()
    way = choose_here(stage.model, stage.batch, dtype, device)
    pipe = stage.model.pipeline(dtype, device, offloading=way.offloading)
    want = encoded(pipe, names, prompts, call, stage.batch)
    del pipe
    release(device)
    encoders = load_encoders(folder, names, dtype)
    pipe = stage.model.pipeline(dtype, device, encoders, way.offloading)
    got = encoded(pipe, names, prompts, call, stage.batch)
    where, what = drawn_on(device, way), "images, text encoders packed"
    _draw(stage, pipe, tree, ENCODERS, units, where, dtype, what)
    del pipe
    release(device)
    return embedding_errors(want, got)


def _write(
    stage: Validate,
    out: Path,
    report: Mapping[str, Any],
    spectra: Mapping[str, Any],
    sets: ImageSets,
) -> None:
    """Write the report as numbers, as a page and as pairs of images."""
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    worst = worst_first(report["images"], stage.pairs)
    write_report(out / "report.html", report, spectra, worst, *_shown(sets, worst))
    if stage.pairs:
        first = range(min(stage.pairs, stage.prompts.count))
        write_pairs(out / "pairs.png", *_shown(sets, first))


def _spectra(plan: list[SitePlan], basis: Artifact | None) -> dict[str, torch.Tensor]:
    """Read what the directions that were left out hold, of every block site."""
    return {
        entry.site.name: read_spectrum(basis, entry.site).left()
        for entry in plan
        if entry.site.kind == "block" and basis is not None
    }


def _made(sets: ImageSets) -> dict[str, Any]:
    """Say how the images were made: where, in which precision and size, in how many seconds."""
    packed, original = sets.places[PACKED], sets.places[ORIGINAL]
    return {
        "seconds_per_image": {
            "original": typical_seconds(*original),
            "packed": typical_seconds(*packed),
        },
        "device": made_on(*packed),
        "devices": {"original": made_on(*original), "packed": made_on(*packed)},
        "dtype": made_in(*packed),
        "size": list(read_images(*packed, [0]).shape[-2:]),
    }


def _shown(sets: ImageSets, indices: Sequence[int]) -> list[torch.Tensor]:
    """Read the pairs to show: [B, 3, H, W] of the 16-bit and of the packed model."""
    return [stills(read_images(*sets.places[name], indices)) for name in (ORIGINAL, PACKED)]


def _sets(stage: Validate, out: Path, reference: Artifact) -> ImageSets:
    """Find the images to compare."""
    theirs = reference.tree("images.zarr")
    places = {PACKED: (out / "images.zarr", PACKED), ORIGINAL: (theirs, ORIGINAL)}
    if (count := len(read_seconds(theirs, ORIGINAL))) != stage.prompts.count:
        raise ArtifactError(
            f"{reference} holds {count} images, {stage.prompts.count} are to be compared: give "
            "reference.prompts and validate.prompts the same prompts"
        )
    if has_images(theirs, FLOOR):
        places[FLOOR] = (theirs, FLOOR)
    return ImageSets(places, stage.prompts.count, stage.batch)


def _refuse_other_dtype(reference: Artifact, dtype: torch.dtype) -> None:
    """Raise ArtifactError unless the 16-bit images were made in ``dtype``."""
    place = reference.tree("images.zarr"), ORIGINAL
    if (made := made_in(*place)) != dtype_name(dtype):
        raise ArtifactError(
            f"the 16-bit images were made in {made} ({made_on(*place)}) and the packed ones would "
            f"be made in {dtype_name(dtype)}: their difference would be that of the precisions "
            f"too. Run with dtype={made}, or give both stages one device"
        )


def _headline(report: Mapping[str, Any], scores: Scores) -> dict[str, float]:
    """Return the scalars that a multirun compares."""
    seconds = report["seconds_per_image"]
    block = [site["sqnr_db"] for site in report["sites"] if site["kind"] == "block"]
    metrics = scores.headline()
    if None not in block:
        metrics["sqnr_db"] = sum(block) / len(block)
    metrics |= {
        f"{row['encoder']}_{row['output']}_db".replace(" ", "_"): row["sqnr_db"]
        for row in report["text_encoders"]
    }
    metrics |= {
        "bits_per_parameter": report["bits_per_parameter"],
        "compression": report["bytes"]["original"] / report["bytes"]["total"],
        "seconds_per_image": seconds["packed"],
        "seconds_per_image_original": seconds["original"],
    }
    for name, shares in scores.attributes.items():
        metrics["attributes" if name == PACKED else f"attributes_{name}"] = shares["mean"]
    return metrics
