"""Judge a trained pipeline: caption accuracy, a sample grid, how peaked its activations are."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from dirotq.evaluate.attribute_reader import AttributeReader, caption_accuracy

_COLUMNS, _ROWS = 6, 4
_MARGIN, _CAPTION = 6, 60  # pixels around an image, and below it for its caption
_LONGEST_LINE = 25  # characters


def load_pipeline(folder: Path, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline in `folder`, quiet, on `device`."""
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def generate(
    pipeline: DiffusionPipeline,
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    batch: int,
) -> Tensor:
    """One image per prompt row, noise from its seed: float32 [B, 3, 128, 128] in [0, 1], CPU."""
    images = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        generators = [torch.Generator().manual_seed(row["seed"]) for row in part]
        prompts = [row["prompt"] for row in part]
        result = pipeline(prompts, generator=generators, output_type="pt", **settings)
        images.append(result.images.float().cpu())
    return torch.cat(images)


def judge(
    folder: Path,
    reader: AttributeReader,
    rows: Sequence[Mapping[str, Any]],
    *,
    device: torch.device,
    batch: int,
) -> tuple[dict[str, Any], Tensor]:
    """Caption accuracy in bfloat16 and float32, kurtosis; and the float32 images [B, 3, L, L]."""
    settings = json.loads((folder / "generation.json").read_text())
    attributes = [row["attributes"] for row in rows]
    report: dict[str, Any] = {"captions": len(rows)}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        pipeline = load_pipeline(folder, device, dtype)
        images = generate(pipeline, rows, settings, batch)
        report[name] = caption_accuracy(reader, images, attributes)
    report["kurtosis"] = kurtosis(pipeline, rows[0]["prompt"], settings)
    return report, images


def scan(
    folder: Path,
    reader: AttributeReader,
    rows: Sequence[Mapping[str, Any]],
    name: str,
    values: Sequence[float],
    *,
    device: torch.device,
    batch: int,
) -> dict[str, dict[str, float]]:
    """Caption accuracy of the 16-bit pipeline for several values of one setting.

    name  of an entry of the scheduler's configuration, or else of an argument of the call
    """
    pipeline = load_pipeline(folder, device, torch.bfloat16)
    settings = json.loads((folder / "generation.json").read_text())
    attributes = [row["attributes"] for row in rows]
    accuracy = {}
    for value in values:
        scheduler = pipeline.scheduler
        if name in scheduler.config:
            pipeline.scheduler = type(scheduler).from_config(scheduler.config, **{name: value})
        else:
            settings[name] = value
        images = generate(pipeline, rows, settings, batch)
        accuracy[f"{value:g}"] = caption_accuracy(reader, images, attributes)
    return accuracy


def kurtosis(
    pipeline: DiffusionPipeline, prompt: str, settings: Mapping[str, Any]
) -> dict[str, float]:
    """Kurtosis (3 = Gaussian) of the input of every linear in a block, over one image's steps."""
    moments: dict[str, list[Tensor]] = {}
    hooks = []

    def watch(name: str):
        def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].float()
            moments.setdefault(name, []).append(torch.stack([x.square().mean(), (x**4).mean()]))

        return record

    for name, module in pipeline.transformer.named_modules():
        if isinstance(module, nn.Linear) and "blocks." in name and "norm" not in name:
            hooks.append(module.register_forward_pre_hook(watch(name)))
    pipeline(prompt, generator=torch.Generator().manual_seed(0), output_type="latent", **settings)
    for hook in hooks:
        hook.remove()
    means = {name: torch.stack(values).mean(0) for name, values in moments.items()}
    return {name: round((m[1] / m[0] ** 2).item(), 2) for name, m in means.items()}


def draw_grid(images: Tensor, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the first 24 images with their captions as one PNG of 128 colors."""
    side = images.shape[-1]
    width, height = side + 2 * _MARGIN, side + _MARGIN + _CAPTION
    grid = Image.new("RGB", (_COLUMNS * width, _ROWS * height), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(9)
    for i, (image, row) in enumerate(zip(images[: _COLUMNS * _ROWS], rows, strict=False)):
        x, y = (i % _COLUMNS) * width + _MARGIN, (i // _COLUMNS) * height + _MARGIN
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        grid.paste(Image.fromarray(np.ascontiguousarray(pixels)), (x, y))
        caption = "\n".join(textwrap.wrap(row["prompt"], _LONGEST_LINE))
        pen.multiline_text((x, y + side + 2), caption, fill="black", font=font, spacing=1)
    grid.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
