"""Runs as `validate` leaves them, without having measured anything."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dirotq.evaluate.statistics import mean_interval
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.store import ArtifactStore

PROMPTS = 12


def scores(mean: float, seed: int = 0, count: int = PROMPTS) -> list[float]:
    """PSNRs around ``mean``: what varies by prompt is the same for all runs, and 0.1 dB is not."""
    prompts = np.random.default_rng(0).normal(0, 3, count)
    return (
        mean + prompts - prompts.mean() + np.random.default_rng(seed).normal(0, 0.1, count)
    ).tolist()


def report(psnr: list[float], **changes: Any) -> dict[str, Any]:
    """A report.json as far as a comparison reads it."""
    first = changes.pop("first_seed", 0)
    ends = mean_interval(psnr).as_dict()
    images = [
        {"prompt": f"prompt {first + i}", "seed": first + i, "psnr": value, "ssim": 0.9}
        for i, value in enumerate(psnr)
    ]
    return {
        "model": "org/model",
        "method": "dirotq",
        "date": "2026-11-30T08:00:00Z",
        "verdict": {"level": "close", "headline": "Still good: differences are hard to see"},
        "images": images,
        "scores": {"psnr": {"packed": ends}, "ssim": {"packed": dict.fromkeys(ends, 0.9)}},
        "bytes": {"codes": 4000, "total": 4000, "original": 16000},
        "bits_per_parameter": 4.0,
        "seconds_per_image": {"packed": 2.0, "original": 1.0},
        "devices": {"packed": "H200", "original": "H200"},
    } | changes


def publish(store: ArtifactStore, content: Any, rank: int = 16, model: str = "m") -> Artifact:
    """A ``rank`` artifact, and the ``validate`` artifact with this report that was made from it."""
    above = _made(store, "rank", {"method": {"name": "dirotq"}, "r": rank}, {}, None)
    text = content if isinstance(content, str) else json.dumps(content)
    digests = [hashlib.sha256(part.encode()).hexdigest() for part in (model, text)]
    recipe = {"model": {"files": {"a": digests[0]}}, "content": digests[1]}
    return _made(store, "validate", recipe, {"rank": str(above)}, text)


def _made(
    store: ArtifactStore,
    stage: str,
    recipe: Mapping[str, Any],
    inputs: Mapping[str, str],
    text: str | None,
) -> Artifact:
    with store.create(stage, {"stage": recipe, "inputs": inputs}) as draft:
        if draft.artifact:
            return draft.artifact
        if text is not None:
            Path(draft.data, "report.json").write_text(text)
    assert draft.artifact is not None
    return draft.artifact
