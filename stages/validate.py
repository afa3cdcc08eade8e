"""Quality, size and speed of exactly the folder that ``pack`` wrote, through the public loader."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import zarr
from torch import Tensor, nn
from torch.nn.functional import linear
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from dirotq.cost import Cost, Machine
from dirotq.device import compute_dtype, pick_device
from dirotq.errors import ConfigError
from dirotq.loading import load
from dirotq.models.attribute_judge import AttributeJudge
from dirotq.models.source import DiffusersModel, generate
from dirotq.models.swap import footprint
from dirotq.models.workload import Workload
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.stage import untracked
from dirotq.plan import SitePlan, read_plan
from dirotq.progress import track
from dirotq.prompts import Prompt, PromptSet, refuse_shared
from dirotq.report import write_pairs, write_report
from dirotq.tensors import load_site, read_array, site_file


@dataclass(frozen=True, kw_only=True)
class Validate:
    """Compare the packed pipeline with the 16-bit one on held-out prompts.

    ``calibration``  the prompts that calibrated, none of which may be among ``prompts``
    ``reader``  judge of captioned attributes, or None
    ``batch``   prompts per pipeline call; each prompt has its own seed, so it changes no image
                beyond rounding
    ``pairs``   image pairs shown in the report

    Writes ``report.json`` (every number, per image and per site), ``report.html`` (one file,
    nothing to fetch) and ``pairs.png``.
    """

    version: ClassVar[str] = "2"

    model: DiffusersModel
    prompts: PromptSet
    calibration: PromptSet = untracked()  # noqa: RUF009 (a field without a default)
    reader: AttributeJudge | None
    batch: int
    pairs: int
    device: str = untracked()

    def __post_init__(self) -> None:
        if self.batch < 1 or self.pairs < 0:
            raise ConfigError(
                f"validate.batch={self.batch}, validate.pairs={self.pairs}: use at least 1 and 0"
            )

    def check(self) -> None:
        """Raise ConfigError before anything runs if a held-out prompt calibrates too."""
        refuse_shared(self.calibration.load(), self.prompts.load())

    def run(
        self, out: Path, *, capture: Artifact, basis: Artifact, rank: Artifact, pack: Artifact
    ) -> Mapping[str, float]:
        device = pick_device(self.device)
        prompts = self.prompts.load()
        folder = pack.tree("model")
        plan = read_plan(rank.file("plan.json"))

        pipe = self.model.pipeline(compute_dtype(device), device)
        want, want_seconds = self._images(pipe, prompts, "16-bit images")
        parameters = sum(p.numel() for p in pipe.transformer.parameters())
        del pipe
        pipe = load(folder, device=str(device))
        got, got_seconds = self._images(pipe, prompts, "packed images")

        sites = self._sites(pipe.transformer, plan, capture, device)
        size = footprint(pipe.transformer)
        report = {
            "images": _compare(prompts, want, got),
            "attributes": self._attributes(prompts, want, got),
            "sites": sites,
            "bytes": size | {"total": sum(size.values()), "original": 2 * parameters},
            "bits_per_parameter": 8 * sum(size.values()) / parameters,
            "parameters": parameters,
            "seconds_per_image": {"original": want_seconds, "packed": got_seconds},
            "device": _device_name(device),
            "inputs": {a.stage: str(a) for a in (capture, basis, rank, pack)},
        }
        metrics = _headline(report)
        report["metrics"] = metrics
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        spectra = {
            e.site.name: _left(load_site(basis.file(f"sites/{site_file(e.site.name)}")))
            for e in plan
            if e.site.kind == "block"
        }
        shown = [_stills(images[: self.pairs]) for images in (want, got)]
        write_report(out / "report.html", report, spectra, *shown)
        if self.pairs:
            write_pairs(out / "pairs.png", *shown)
        return metrics

    def cost(self, work: Workload, machine: Machine) -> Cost:
        """Held-out images from both pipelines, each wholly in memory."""
        samples = self.batch * work.guided
        forward = machine.forward_seconds(
            samples * work.forward_flops, work.channels, len(work.by_block)
        )
        calls = -(-work.heldout // self.batch) * work.steps
        # On the reference path the weights are unpacked in every call.
        packed = 1.0 if machine.gpu else 2.5
        decode = machine.forward_seconds(work.decoder_flops, work.channels, 0) * work.heldout
        weights = machine.width * work.parameters + work.components
        peak = max(work.activations(samples, machine.width), self.batch * work.decoder_bytes)
        pictures = 2 * work.heldout * 12 * work.pixels
        return Cost(
            seconds=machine.start + calls * forward * (1 + packed) + 2 * decode
            + (2 * weights + work.moments) / machine.load + 2 * len(work.planned) * machine.site,
            disk=self.pairs * 6 * work.pixels + 1500 * len(work.planned),
            lower="validate.batch=1, until=pack (which leaves it out)",
            **machine.memory(weights + peak, pictures),
        )  # fmt: skip

    def _images(self, pipe: Any, prompts: Sequence[Prompt], what: str) -> tuple[Tensor, float]:
        """Images [B, 3, H, W] and mean seconds per image, the first batch left out if it can be."""
        call = self.model.call_arguments()
        images, seconds = [], []
        for start in track(range(0, len(prompts), self.batch), what):
            batch = prompts[start : start + self.batch]
            began = time.perf_counter()
            images.append(generate(pipe, batch, call))
            seconds.append((time.perf_counter() - began) / len(batch))
        timed = seconds[1:] or seconds
        return torch.cat(images), sum(timed) / len(timed)

    def _attributes(
        self, prompts: Sequence[Prompt], want: Tensor, got: Tensor
    ) -> dict[str, dict[str, float]] | None:
        if self.reader is None:
            return None
        return {
            "original": self.reader.accuracy(want, prompts),
            "packed": self.reader.accuracy(got, prompts),
        }

    def _sites(
        self, packed: nn.Module, plan: list[SitePlan], capture: Artifact, device: torch.device
    ) -> list[dict[str, Any]]:
        """Output SQNR of every site on its sampled rows, with its line of the plan."""
        rows = zarr.open_group(capture.tree("rows.zarr"), mode="r")
        weights = self.model.weights()
        found = []
        for entry in plan:
            x = read_array(rows, entry.site.name).to(device, torch.float32)
            weight, bias = weights.stacked(entry.site, device)
            want = linear(x, weight, bias)
            got = packed.get_submodule(entry.site.name)(x)
            noise = (got - want).square().sum().clamp_min(1e-30)
            found.append(
                {
                    "site": entry.site.name,
                    "kind": entry.site.kind,
                    "dim": entry.site.dim,
                    "outputs": entry.spec.outputs,
                    "rank": entry.spec.rank,
                    "format": entry.spec.format,
                    "sqnr_db": float(10 * torch.log10(want.square().sum() / noise)),
                    "why": entry.why,
                }
            )
        return found


def _compare(prompts: Sequence[Prompt], want: Tensor, got: Tensor) -> list[dict[str, Any]]:
    """PSNR (dB, range 1) and SSIM of each pair of images."""
    psnr = _per_image(lambda a, b: peak_signal_noise_ratio(a, b, data_range=1.0), got, want)
    ssim = _per_image(
        lambda a, b: structural_similarity_index_measure(a, b, data_range=1.0), got, want
    )
    return [
        {"prompt": p.text, "seed": p.seed, "psnr": a, "ssim": b}
        for p, a, b in zip(prompts, psnr, ssim, strict=True)
    ]


def _per_image(score: Callable[[Tensor, Tensor], Any], got: Tensor, want: Tensor) -> list[float]:
    """Of a video, the score of its frames together."""
    pairs = zip(got, want, strict=True)
    return [float(score(*(x.reshape(-1, *x.shape[-3:]) for x in pair))) for pair in pairs]


def _stills(images: Tensor) -> Tensor:
    """[B, 3, H, W]: the images, or each video's middle frame."""
    return images[:, images.shape[1] // 2] if images.dim() == 5 else images


def _headline(report: Mapping[str, Any]) -> dict[str, float]:
    """The scalars that a sweep compares."""
    images, seconds = report["images"], report["seconds_per_image"]
    block = [site["sqnr_db"] for site in report["sites"] if site["kind"] == "block"]
    metrics = {
        "psnr": sum(i["psnr"] for i in images) / len(images),
        "ssim": sum(i["ssim"] for i in images) / len(images),
        "sqnr_db": sum(block) / len(block),
        "bits_per_parameter": report["bits_per_parameter"],
        "compression": report["bytes"]["original"] / report["bytes"]["total"],
        "seconds_per_image": seconds["packed"],
        "seconds_per_image_original": seconds["original"],
    }
    if report["attributes"]:
        metrics["attributes"] = report["attributes"]["packed"]["mean"]
        metrics["attributes_original"] = report["attributes"]["original"]["mean"]
    return metrics


def _left(found: Mapping[str, Tensor]) -> Tensor:
    """Share of a site's energy outside of its 1, 2, ... leading directions, [L]."""
    return 1 - found["variances"].flip(0).cumsum(0) / found["energy"]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, reference path"
