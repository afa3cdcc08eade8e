"""`make bench-compress`: the line on a model of full size with generated weights, stage by stage.

    python benchmarks/compress.py flux --models /dev/shm --store artifacts --depth 0.25 OVERRIDES

Prints one row per stage: seconds, peak VRAM and RAM and bytes on disk beside what was told of them.
Stages that are in the store already are listed with what they took.
"""

import argparse
import json
import logging
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from dirotq.benchmarks import full_size, packed_check
from dirotq.device import pick_device
from dirotq.pipeline import dag, preflight
from dirotq.pipeline.config import build, compose_config
from dirotq.pipeline.dag import Step

DEPTH = {"flux": ("num_layers", "num_single_layers"), "pixart_sigma": ("num_layers",)}
DEPTH["sana"] = ("num_layers",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=full_size.ARCHITECTURES)
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
    rows: list[dict[str, Any]] = []
    artifacts: dict[str, Any] = {}
    for index, step in enumerate(line.steps):
        known = line.store.get(step.name, step.fingerprint)
        began = time.monotonic()
        steps = line.steps[: index + 1]
        outcomes = dag.run(steps, line.store, line.executor, estimates=found.records)
        outcome = outcomes[step.name]
        seconds = time.monotonic() - began
        rows.append(row(step, outcome.artifact, None if known else seconds))
        print(json.dumps(rows[-1]), flush=True)
        artifacts[step.name] = outcome.artifact
    print(table(rows, options, device), flush=True)
    if "pack" in artifacts:
        print(packed_check.check(line.steps[0].stage.model, artifacts, device))


def generated(name: str, models: Path, depth: float, device: torch.device) -> Path:
    """The generated pipeline's folder, made if it is not there."""
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


def row(step: Step, artifact: Any, seconds: float | None) -> dict[str, Any]:
    """One stage's figures; ``seconds`` of the whole step, or None if it was cached."""
    past = artifact.provenance
    expected = past.get("estimate", {})
    return {
        "stage": step.name,
        "estimated": {
            k: float(f"{v:.4g}") for k, v in expected.items() if isinstance(v, float | int)
        },
        "seconds": round(past["seconds"] if seconds is None else seconds, 1),
        "cached": seconds is None,
        "vram_gb": round(past.get("peak_vram_bytes", 0) / 1e9, 1),
        "ram_gb": round(past["peak_rss_bytes"] / 1e9, 1),
        "disk_gb": round(artifact.bytes / 1e9, 2),
        "metrics": artifact.metrics,
    }


def table(rows: list[dict[str, Any]], options: argparse.Namespace, device: torch.device) -> str:
    """The rows as Markdown, with their sum and the machine."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    lines = [
        f"\n{options.model}, depth {options.depth:g}, {' '.join(options.overrides) or 'defaults'}; "
        f"{chip}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n",
        "| stage | seconds | VRAM, GB | told | RAM, GB | told | disk, GB | told |",
        "|---" * 8 + "|",
    ]
    for one in rows:
        told = one["estimated"]
        numbers = (
            one["seconds"], one["vram_gb"], told.get("vram", 0) / 1e9, one["ram_gb"],
            told.get("ram", 0) / 1e9, one["disk_gb"], told.get("disk", 0) / 1e9,
        )  # fmt: skip
        lines.append(f"| {one['stage']} | " + " | ".join(f"{n:.4g}" for n in numbers) + " |")
    peak = {key: max(one[key] for one in rows) for key in ("vram_gb", "ram_gb")}
    lines.append(
        f"| all | {sum(one['seconds'] for one in rows):.4g} | "
        f"{peak['vram_gb']:g} | | {peak['ram_gb']:g} | | "
        f"{sum(one['disk_gb'] for one in rows):.1f} | |"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
