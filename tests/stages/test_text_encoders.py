"""Text encoders through the line: packed beside the transformer, loaded, measured."""

import json

import diffusers
import pytest
import torch
from tiny_line import CALL, CAPTIONS, run_stage, stage

import dirotq
from dirotq.errors import ConfigError
from dirotq.evaluate.images import read_images
from dirotq.kernels.weight_only import WeightOnlyLinear

ENCODERS = ("text_encoder", "text_encoder_2")


@pytest.fixture(scope="module", params=["w8", "w4"])
def made(request, line, finished, tmp_path_factory):
    """The tiny line's pack and validate with packed text encoders: their folder and metrics."""
    root = tmp_path_factory.mktemp(request.param)
    built = line(f"text_encoders={request.param}")
    inputs = {name: finished[name] for name in ("rank", "gptq", "fuse")}
    metrics = run_stage(stage(built, "pack"), root / "pack", **inputs)
    return request.param, root / "pack" / "model", metrics


def image(pipe):
    noise = torch.Generator("cpu").manual_seed(1)
    return pipe(CAPTIONS[0], generator=noise, output_type="pt", **CALL).images.float()


def test_loaders_restore_them(made, finished):
    _, folder, metrics = made
    ours = dirotq.load(folder, device="cpu")
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    for name in ENCODERS:
        linears = [m for m in getattr(ours, name).modules() if isinstance(m, WeightOnlyLinear)]
        assert linears
    assert torch.equal(image(ours), image(theirs))
    kept = image(dirotq.load(finished["pack"].path, device="cpu"))
    assert 0 < (image(ours) - kept).abs().max()
    assert metrics["text_encoders_kept"] == 0
    card = (folder / "README.md").read_text()
    assert f"have {made[0][1]} bits" in card
