"""The sample grid stays small enough to commit."""

from pathlib import Path

import torch
from PIL import Image

from dirotq.assets import evaluate
from dirotq.assets.captions import prompt_rows
from dirotq.assets.scenes import render, sample_scenes


def test_grid_holds_24_captioned_images(tmp_path: Path) -> None:
    rows = prompt_rows(30, heldout=False, seed=1)
    images = render(sample_scenes(30, torch.Generator().manual_seed(1))) * 0.5 + 0.5
    noisy = (images + 0.01 * torch.randn_like(images)).clamp(0, 1)
    path = tmp_path / "grid.png"
    evaluate.draw_grid(noisy, rows, path)
    assert path.stat().st_size <= 300_000
    with Image.open(path) as grid:
        assert grid.size == (6 * 140, 4 * 194)
