"""Quality, size and speed of exactly the folder that ``pack`` wrote, through the public loader."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import linear

from dirotq.device import choose_dtype, device_name, pick_device, refuse_dtype, release
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
from dirotq.evaluate.timesteps import RowErrors, by_timestep
from dirotq.evaluate.verdict import verdict
from dirotq.loading import load
from dirotq.models.denoisers import denoisers_of, joined, prefix
from dirotq.packed.swap import footprint
from dirotq.packed.text_encoders import load_encoders, packed_encoders
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.lineage import stage_settings
from dirotq.pipeline.stage import recipe, untracked
from dirotq.pipeline.units import Units
from dirotq.quantize import memory
from dirotq.quantize.moments import Captured
from dirotq.quantize.plan import SitePlan, read_plan
from dirotq.quantize.planning import read_spectrum
from dirotq.quantize.running import of_folder
from dirotq.quantize.uncalibrated import advice
from dirotq.sources.model import DiffusersModel
from dirotq.sources.prompts import PromptSet, refuse_shared
from dirotq.sources.weights import Weights


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
        plan = read_plan(rank.file("plan.json"))
        sets = _sets(self, out, reference)
        tree, theirs = out / "images.zarr", reference.tree("images.zarr")

        dtype = choose_dtype(self.dtype, device)
        pipe = _pipeline(pack, device, dtype, theirs)
        prompts = self.prompts.load()
        where = "CPU, reference path" if device.type == "cpu" else device_name(device)
        units = Units(out, self)
        writer = ImageWriter(
            tree, PACKED, len(prompts), device=where, dtype=_plain(dtype), units=units
        )
        resumed = len(prompts) - sum(map(len, writer.missing(self.batch)))
        call = self.model.sample_arguments()
        generate_all(writer, pipe, prompts, call, self.batch, "packed images")
        denoisers = denoisers_of(pipe)
        network = joined(denoisers)
        errors: Mapping[str, RowErrors] = {}
        if capture is not None:
            known = Captured(capture)
            errors = _errors(self.model.weights(), network, plan, known, device)
        sites, timesteps = _sites(plan, errors)
        size = footprint(network)
        parts = _parts(denoisers, sites) if len(denoisers) > 1 else {}
        del denoisers, network
        parameters = sum(p.numel() for p in self.model.shapes().parameters())
        del pipe
        release(device)
        embeddings = _text_encoders(self, pack, device, dtype, tree, units)
        if has_images(tree, ENCODERS):
            sets = replace(sets, places={**sets.places, ENCODERS: (tree, ENCODERS)})

        scores = score(sets, prompts, self.reader, self.learned, device)
        images, table = scores.rows(prompts), scores.table()
        running = of_folder(pack.tree("model"))
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
            "sites": sites,
            "timesteps": timesteps,
            **({"denoisers": parts} if parts else {}),
            "bytes": size | {"total": sum(size.values()), "original": 2 * parameters},
            "bits_per_parameter": 8 * sum(size.values()) / parameters,
            "parameters": parameters,
            "text_encoders": embeddings,
            "running": running.reported(),
            "seconds_per_image": {
                "original": typical_seconds(theirs, ORIGINAL),
                "packed": typical_seconds(tree, PACKED),
            },
            "device": made_on(tree, PACKED),
            "devices": {"original": made_on(theirs, ORIGINAL), "packed": made_on(tree, PACKED)},
            "dtype": made_in(tree, PACKED),
            "size": list(read_images(tree, PACKED, [0]).shape[-2:]),
            "inputs": {a.stage: str(a) for a in inputs},
        }
        metrics = _headline(report, scores)
        report["metrics"] = metrics
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        spectra = {
            entry.site.name: read_spectrum(basis, entry.site).left()
            for entry in plan
            if entry.site.kind == "block" and basis is not None
        }
        worst = worst_first(images, self.pairs)
        write_report(out / "report.html", report, spectra, worst, *_shown(sets, worst))
        if self.pairs:
            write_pairs(out / "pairs.png", *_shown(sets, range(min(self.pairs, len(prompts)))))
        return metrics


def _text_encoders(
    stage: Validate,
    pack: Artifact,
    device: torch.device,
    dtype: torch.dtype,
    tree: Path,
    units: Units,
) -> list[dict[str, Any]]:
    """Measure what packed text encoders do to embeddings, and make images with them alone packed.

    Returns the rows of :func:`embedding_errors`; none where all encoders are in 16 bits.
    """
    folder = pack.tree("model")
    if not (names := packed_encoders(folder)):
        return []
    prompts, call = stage.prompts.load(), stage.model.sample_arguments()
    pipe = stage.model.pipeline(dtype, device)
    want = encoded(pipe, names, prompts, call, stage.batch)
    del pipe
    release(device)
    pipe = stage.model.pipeline(dtype, device, load_encoders(folder, names, dtype))
    got = encoded(pipe, names, prompts, call, stage.batch)
    where = "CPU" if device.type == "cpu" else device_name(device)
    writer = ImageWriter(
        tree, ENCODERS, len(prompts), device=where, dtype=_plain(dtype), units=units
    )
    generate_all(writer, pipe, prompts, call, stage.batch, "images, text encoders packed")
    del pipe
    release(device)
    return embedding_errors(want, got)


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


def _pipeline(pack: Artifact, device: torch.device, dtype: torch.dtype, theirs: Path) -> Any:
    """Load the packed pipeline, in the precision that the 16-bit images were made in."""
    made = made_in(theirs, ORIGINAL)
    if made != _plain(dtype):
        raise ArtifactError(
            f"the 16-bit images were made in {made} ({made_on(theirs, ORIGINAL)}) and the "
            f"packed ones would be made in {_plain(dtype)}: their difference would be that of "
            f"the precisions too. Run with dtype={made}, or give both stages one device"
        )
    return load(pack.tree("model"), device=str(device), dtype=dtype)


def _errors(
    weights: Weights,
    packed: nn.Module,
    plan: list[SitePlan],
    captured: Captured,
    device: torch.device,
) -> dict[str, RowErrors]:
    """Measure the output errors of every site on its sampled rows."""
    errors = {}
    for entry in plan:
        x_TD = captured.rows(entry.site).to(device, torch.float32)
        weight, bias = weights.stacked(entry.site, device)
        want = linear(x_TD, weight, bias)
        got = packed.get_submodule(entry.site.name)(x_TD)
        signal_T, noise_T = (p.square().sum(-1).double().cpu() for p in (want, got - want))
        errors[entry.site.name] = RowErrors(signal_T, noise_T, captured.timesteps(entry.site))
    return errors


def _sites(
    plan: list[SitePlan], errors: Mapping[str, RowErrors]
) -> tuple[list[dict[str, Any]], list[float]]:
    """Return the output SQNR of every site, None where it was not measured, with its line of the
    plan; and the timesteps that ``by_timestep`` of each site is for.
    """
    timesteps, columns = by_timestep(errors)
    found = [
        {
            "site": entry.site.name,
            "kind": entry.site.kind,
            "dim": entry.site.in_features,
            "outputs": entry.spec.outputs,
            "rank": entry.spec.rank,
            "format": entry.spec.format,
            "sqnr_db": errors[entry.site.name].sqnr_db if errors else None,
            "by_timestep": columns.get(entry.site.name, []),
            "why": entry.why,
        }
        for entry in plan
    ]
    return found, timesteps


def _parts(denoisers: Mapping[str, nn.Module], sites: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum up each denoiser of several: its bytes, and its block sites' mean output SQNR in dB."""
    found = {}
    for part, denoiser in denoisers.items():
        inside = [s for s in sites if s["site"].startswith(prefix(part)) and s["kind"] == "block"]
        known = [s["sqnr_db"] for s in inside if s["sqnr_db"] is not None]
        sqnr = sum(known) / len(known) if known else None
        found[part] = {"bytes": sum(footprint(denoiser).values()), "sqnr_db": sqnr}
    return found


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


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
