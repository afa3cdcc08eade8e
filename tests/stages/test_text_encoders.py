"""Text encoders through the line: packed beside the transformer, loaded, measured."""

import dataclasses
import json
import shutil

import diffusers
import pytest
import torch
from tiny_line import CALL, CAPTIONS, publish, run_stage, stage
from tiny_offload import absent

import dirotq
from dirotq.evaluate.images import read_images
from dirotq.kernels.weight_only import WeightOnlyLinear
from dirotq.quantize.running import Way

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
    assert (image(ours) - kept).abs().max() > 0
    assert metrics["text_encoders_kept"] == 0
    assert metrics.get("text_linears_nearest") == (None if made[0] == "w8" else 0)
    card = (folder / "README.md").read_text()
    assert f"have {made[0][1]} bits" in card


def test_without_prompts_codes_are_the_nearest_and_lose_more(made, line, finished, tmp_path):
    if made[0] == "w8":
        pytest.skip("8 bits are not calibrated")
    pack = dataclasses.replace(stage(line("text_encoders=w4"), "pack"), prompts=None)
    inputs = {name: finished[name] for name in ("rank", "gptq", "fuse")}
    metrics = run_stage(pack, tmp_path, **inputs)
    assert metrics["text_linears_nearest"] > 0
    folders = {"16": finished["pack"].path, "gptq": made[1], "nearest": tmp_path / "model"}
    found = {}
    for name, folder in folders.items():
        pipe = dirotq.load(folder, device="cpu")
        with torch.no_grad():
            found[name] = pipe.encode_prompt(CAPTIONS[0], CAPTIONS[0], max_sequence_length=8)[0]
    lost = {n: (found[n] - found["16"]).norm() for n in ("gptq", "nearest")}
    assert lost["gptq"] < 0.8 * lost["nearest"]


def test_the_report_has_them_alone_and_with_all(made, line, finished, tmp_path):
    name, folder, _ = made
    packed = publish(
        tmp_path / "store", "pack", lambda data: shutil.copytree(folder, data / "model")
    )
    validate = dataclasses.replace(stage(line(f"text_encoders={name}"), "validate"), reader=None)
    inputs = {n: finished[n] for n in ("capture", "basis", "rank", "reference")} | {"pack": packed}
    metrics = run_stage(validate, tmp_path / "out", **inputs)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {(row["encoder"], row["output"]): row["sqnr_db"] for row in report["text_encoders"]}
    assert {encoder for encoder, _ in rows} == set(ENCODERS)
    least, most = (30, 55) if name == "w8" else (5, 30)
    assert all(least < value < most for value in rows.values()), rows
    assert metrics["text_encoder_2_last_hidden_state_db"] == rows[ENCODERS[1], "last_hidden_state"]
    assert len(read_images(tmp_path / "out" / "images.zarr", "encoders")) == 2
    assert metrics["psnr_encoders"] > metrics["psnr"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "text encoders alone packed" in page


@pytest.mark.parametrize("kind", ["model", "group"])
def test_weights_that_wait_change_no_number(made, line, finished, tmp_path, monkeypatch, kind):
    name, folder, _ = made
    packed = publish(
        tmp_path / "store", "pack", lambda data: shutil.copytree(folder, data / "model")
    )
    validate = dataclasses.replace(stage(line(f"text_encoders={name}"), "validate"), pairs=0)
    inputs = {n: finished[n] for n in ("rank", "reference")} | {"pack": packed}
    found = {}
    for way in (Way("none"), Way(kind)):
        with monkeypatch.context() as patch:
            if way.offloading == "group":
                absent(patch)
            patch.setattr("dirotq.stages.validate.choose_here", lambda *_, way=way: way)
            run_stage(validate, out := tmp_path / way.offloading, **inputs)
        report = json.loads((out / "report.json").read_text())
        found[way] = report["text_encoders"], report["scores"]
    one, other = found.values()
    assert one == other
