"""Every score of a packed model's images, beside the 16-bit model's own scores and its noise floor.

Images come from disk a batch at a time. Sets of the same prompts and noise: ``packed``,
``original`` (the 16-bit model), where the reference stage made it ``floor`` (the 16-bit model
again, through other kernels), and where text encoders are packed ``encoders`` (the 16-bit model
with these).  B images of a batch, N of a set, F features.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dirotq.errors import ArtifactError
from dirotq.evaluate.attribute_judge import AttributeJudge
from dirotq.evaluate.distributions import frechet_distance, kernel_distance
from dirotq.evaluate.fidelity import fidelity
from dirotq.evaluate.images import read_images, read_sounds
from dirotq.evaluate.metrics import Metric
from dirotq.evaluate.sounds import likeness
from dirotq.evaluate.statistics import difference_interval, mean_interval
from dirotq.kernels.full_float32 import full_float32
from dirotq.progress import track
from dirotq.sources.prompts import Prompt

PACKED, FLOOR, ORIGINAL, ENCODERS = "packed", "floor", "original", "encoders"


@dataclass(frozen=True, slots=True)
class Scores:
    """``images``: {metric: {set: N values}}; ``sets``: {metric: {set: value}}; ``attributes``:
    {set: {kind: share of captioned attributes shown}}, empty without a reader.
    """

    images: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    sets: dict[str, dict[str, float]] = field(default_factory=dict)
    attributes: dict[str, dict[str, float]] = field(default_factory=dict)

    def rows(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Return one per image: prompt, seed, the packed image's scores, other sets' inside."""
        rows: list[dict[str, Any]] = [{"prompt": p.text, "seed": p.seed} for p in prompts]
        for metric, sets in self.images.items():
            for name, values in sets.items():
                for row, value in zip(rows, values, strict=True):
                    place = row if name == PACKED else row.setdefault(name, {})
                    place[metric] = value
        return rows

    def table(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return {metric: {set: {mean, low, high}}}, 95 % where there is a score per image.

        Where the 16-bit images have scores of their own, ``difference`` is packed - original,
        paired. Of a whole set there is a ``mean`` alone.
        """
        table: dict[str, dict[str, dict[str, float]]] = {}
        for metric, sets in self.images.items():
            line = {name: mean_interval(values).as_dict() for name, values in sets.items()}
            if ORIGINAL in sets:
                apart = difference_interval(sets[PACKED], sets[ORIGINAL])
                line["difference"] = apart.as_dict()
            table[metric] = line
        for metric, values in self.sets.items():
            table[metric] = {name: {"mean": value} for name, value in values.items()}
        return table

    def headline(self) -> dict[str, float]:
        """Return the means, named ``metric`` for the packed images, ``metric_floor``, ..."""
        return {
            metric if name == PACKED else f"{metric}_{name}": numbers["mean"]
            for metric, line in self.table().items()
            for name, numbers in line.items()
        }


@dataclass(frozen=True, slots=True)
class ImageSets:
    """Where the images of each set are: {set: (Zarr tree, name in it)}, N of each."""

    places: Mapping[str, tuple[Path, str]]
    count: int
    batch: int

    def __len__(self) -> int:
        return math.ceil(self.count / self.batch)

    def __iter__(self) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Read batches: which images, and {set: [B, 3, H, W] or [B, F, 3, H, W]}."""
        for start in range(0, self.count, self.batch):
            span = slice(start, min(start + self.batch, self.count))
            yield span, {name: read_images(*at, span) for name, at in self.places.items()}


@full_float32()  # a GPU's convolutions would take ten bits of each number
def score(
    sets: ImageSets,
    prompts: Sequence[Prompt],
    reader: AttributeJudge | None,
    learned: Mapping[str, Metric],
    device: torch.device,
) -> Scores:
    """Score everything, in one pass over the images and one more per learned metric.

    PSNR, SSIM and MS-SSIM to the original, and the same of sounds where the pipeline makes some
    (dirotq/evaluate/sounds.py); with a reader, ``captioned`` (the share of its captioned
    attributes that an image shows), FID and KID of its features to the original's, from two images
    on.
    """
    found = Scores()
    features_BF: dict[str, list[Tensor]] = {name: [] for name in sets.places}
    counts: dict[str, list[dict[str, Tensor]]] = {name: [] for name in sets.places}
    for span, stored in track(sets, "scores"):
        images = {name: batch.to(device) for name, batch in stored.items()}
        for name in [name for name in images if name != ORIGINAL]:
            for kind, values in fidelity(images[name], images[ORIGINAL]).items():
                found.images.setdefault(kind, {}).setdefault(name, []).extend(values)
        for kind, of_sets in _heard(sets, span).items():
            for name, values in of_sets.items():
                found.images.setdefault(kind, {}).setdefault(name, []).extend(values)
        if reader is not None:
            for name, shown in images.items():
                features_BF[name].append(reader.features(stills(shown)))
                counts[name].append(reader.counts(stills(shown), prompts[span]))
    if reader is not None:
        _judge(found, reader, features_BF, counts)
    for name, metric in learned.items():
        _measure(found, name, metric, sets, prompts, device)
    return found


def _heard(sets: ImageSets, span: slice) -> dict[str, dict[str, list[float]]]:
    """Return {metric: {set: values}} of the sounds of a batch; nothing where there are none.

    Raises ArtifactError if some of the sets have none, or others than the 16-bit model's.
    """
    sounds = {name: read_sounds(*at, span) for name, at in sets.places.items()}
    shapes = {name: None if s is None else tuple(s.shape[1:]) for name, s in sounds.items()}
    if len(set(shapes.values())) > 1:
        raise ArtifactError(
            f"sounds of {shapes} (channels, samples) can't be compared: their images are of "
            "several models, or of several versions of DiRotQ; recompute them with "
            "force=[reference,validate]"
        )
    found: dict[str, dict[str, list[float]]] = {}
    want = sounds.pop(ORIGINAL)
    for name, got in sounds.items():
        if got is not None and want is not None:
            for kind, values in likeness(got, want).items():
                found.setdefault(kind, {})[name] = values
    return found


def stills(images: Tensor) -> Tensor:
    """Return [B, 3, H, W]: the images, or each video's middle frame."""
    return images[:, images.shape[1] // 2] if images.dim() == 5 else images


def _judge(
    found: Scores,
    reader: AttributeJudge,
    features_BF: Mapping[str, list[Tensor]],
    counts: Mapping[str, list[dict[str, Tensor]]],
) -> None:
    """Add the attribute reader's part of the scores."""
    for name in (ORIGINAL, FLOOR, ENCODERS, PACKED):
        if name not in counts:
            continue
        whole = {kind: torch.cat([c[kind] for c in counts[name]]) for kind in counts[name][0]}
        found.attributes[name] = reader.totals(whole)
        shown_N, promised_N = sum(whole.values()).unbind(1)  # type: ignore[union-attr]
        found.images.setdefault("captioned", {})[name] = (shown_N / promised_N).tolist()
    features_NF = {name: torch.cat(parts) for name, parts in features_BF.items()}
    if len(features_NF[ORIGINAL]) < 2:
        return
    for metric, distance in (("fid", frechet_distance), ("kid", kernel_distance)):
        found.sets[metric] = {
            name: distance(features, features_NF[ORIGINAL])
            for name, features in features_NF.items()
            if name != ORIGINAL
        }


def _measure(
    found: Scores,
    name: str,
    metric: Metric,
    sets: ImageSets,
    prompts: Sequence[Prompt],
    device: torch.device,
) -> None:
    """Add one learned metric over every set that it can score."""
    meter = metric.open(device)
    for chosen in sets.places:
        if metric.paired and chosen == ORIGINAL:
            continue
        for span, images in track(sets, f"{name}, {chosen} images"):
            texts = [prompt.text for prompt in prompts[span]]
            meter.update(stills(images[chosen]), texts, stills(images[ORIGINAL]))
        value = meter.compute()
        if isinstance(value, list):
            found.images.setdefault(name, {})[chosen] = value
        else:
            found.sets.setdefault(name, {})[chosen] = value
