"""`make bench-compress`: all stages on a model of full size with generated weights.

    python benchmarks/compress.py flux --models /dev/shm --store artifacts --depth 0.25 OVERRIDES

`preset=instant` among the OVERRIDES leaves calibration out: every stage from the weights alone.

Prints one row per stage: seconds, peak VRAM and RAM and bytes on disk beside what was told of them.
Stages that are in the store already are listed with what they took.
"""

import argparse
import logging
import os
import platform
import shutil
import time
from pathlib import Path

import torch

from dirotq.benchmarks import full_size, packed_check
from dirotq.device import pick_device
from dirotq.pipeline import dag, preflight
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.config import build, compose_config

DEPTH = {"flux": ("num_layers", "num_single_layers"), "pixart_sigma": ("num_layers",)}
DEPTH["sana"] = ("num_layers",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=DEPTH)
    parser.add_argument("--models", type=Path, default=Path("artifacts/full-size"))
    parser.add_argument("--store", default="artifacts")
    parser.add_argument("--depth", type=float, default=1.0, help="share of the blocks")
    parser.add_argument("--until", default="pack")
    parser.add_argument("overrides", nargs="*", help="e.g. capture.vram=24GB")
    options = parser.parse_intermixed_args()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as `dirotq` does
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    device = pick_device("auto")
    folder = generated(options.model, options.models, options.depth, device)
    told = [f"model={folder}", f"store={options.store}", f"until={options.until}"]
    cfg = compose_config([*told, *options.overrides], "dirotq.conf")
    line = build(cfg)
    found = preflight.examine(line, cfg)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    print(
        f"\n{options.model}, depth {options.depth:g}, {' '.join(options.overrides) or 'defaults'}; "
        f"{chip}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n\n"
        "| stage | seconds | VRAM, GB | told | RAM, GB | told | disk, GB | told |\n"
        + "|---" * 8
        + "|"
    )
    rows: list[list[float]] = []
    artifacts: dict[str, Artifact] = {}
    for index, step in enumerate(line.steps):
        known = line.store.get(step.name, step.fingerprint)
        began = time.monotonic()
        steps = line.steps[: index + 1]
        outcomes = dag.run(steps, line.store, line.executor, estimates=found.records)
        took = time.monotonic() - began  # the whole step; of a cached one, what it took then
        artifacts[step.name] = artifact = outcomes[step.name].artifact
        rows.append(figures(artifact, None if known else took))
        cells = " | ".join(f"{number:.4g}" for number in rows[-1])
        print(f"| {step.name}{' (cached)' if known else ''} | {cells} |", flush=True)
    seconds, vram, _, ram, _, disk, _ = zip(*rows, strict=True)
    print(
        f"| all | {sum(seconds):.4g} | {max(vram):.4g} | | {max(ram):.4g} | | {sum(disk):.4g} | |"
    )
    if {"pack", "capture"} <= artifacts.keys():
        print(packed_check.check(line.steps[0].stage.model, artifacts, device))


def generated(name: str, models: Path, depth: float, device: torch.device) -> Path:
    """Return the generated pipeline's folder, made if it is not there."""
    folder = models / f"{name}-{depth:g}"
    if not (folder / "model_index.json").exists():
        config = full_size.ARCHITECTURES[name][1]
        changes = {key: max(round(config[key] * depth), 1) for key in DEPTH[name]}
        began = time.monotonic()
        partial = folder.with_name(f"{folder.name}.partial")  # what a killed run leaves
        shutil.rmtree(partial, ignore_errors=True)
        full_size.build(name, partial, device, **changes).rename(folder)
        print(f"generated {folder} in {time.monotonic() - began:.0f} s", flush=True)
    return folder


def figures(artifact: Artifact, seconds: float | None) -> list[float]:
    """Return seconds, then GB of VRAM, RAM and disk, each followed by what was told of it."""
    past = artifact.provenance
    told = past.get("estimate", {})
    sizes = (
        past.get("peak_vram_bytes", 0), told.get("vram", 0), past["peak_rss_bytes"],
        told.get("ram", 0), artifact.bytes, told.get("disk", 0),
    )  # fmt: skip
    return [past["seconds"] if seconds is None else seconds, *(size / 1e9 for size in sizes)]


if __name__ == "__main__":
    main()
