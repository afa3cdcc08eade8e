"""What a user can get wrong about the line: one paragraph on stderr, exit code 2, nothing lost."""

import json
import shutil
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_line import overrides
from toy_fixtures import logging_put_back

from dirotq.cli import main
from dirotq.files.sums import SUMS, write_sums


class Said(NamedTuple):
    status: int
    err: str


@pytest.fixture
def compress(capsys, tiny_root, store_root):
    """``dirotq compress`` on the tiny pipeline in this process, with a store of its own."""

    def call(*more: str, verb: str = "compress") -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([verb, *overrides(tiny_root, store_root, *more)])
        return Said(left.value.code, capsys.readouterr().err)

    with logging_put_back():
        yield call


@pytest.fixture
def made(finished, store_root):
    """``made("basis")``: the store as it is when the line has run up to there."""

    def until(last: str) -> None:
        for name in list(finished)[: list(finished).index(last) + 1]:
            shutil.copytree(finished[name].path, store_root / name / finished[name].fingerprint)

    return until


def test_settings_that_shapes_do_not_tell_fail_as_the_models(compress, own_folder):
    """Every tensor fits; the 16-bit model alone can't be called."""
    file = own_folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"axes_dims_rope": [8, 12, 14]}))
    said = compress(f"model={own_folder}")
    refused(said, "the 16-bit FluxPipeline fails when it is called (RuntimeError: The size of")


def published(store) -> list[str]:
    return sorted({p.parent.parent.name for p in store.glob("*/*/manifest.json")})


def refused(said: Said, *parts: str) -> None:
    assert said.status == 2
    assert "Traceback" not in said.err
    paragraph = said.err.splitlines()[-1]
    assert paragraph.startswith("dirotq: ")
    for part in parts:
        assert part in paragraph


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("rank.r=12", ["rank.r=12 is not on the grid", "multiple of 8"]),
        ("rank.r=1024", ["transformer_blocks.0", "rank 1024 is not in 0 ... 64"]),
        ("rank.energy=0.5", ["set exactly one"]),
        (
            "act_format.group=48",
            ["transformer_blocks.0", "48 does not divide the 64", "use one of"],
        ),
        ("act_format=int4_pow2 act_format.element=int8", ["leave INT8", "'token' or 'group'"]),
        ("method.rounding=up", ["'up'", "'gptq' or 'nearest'"]),
        ("gptq.damping=0", ["gptq.damping=0", "0 < damping <= 1"]),
        ("capture.vram=8GB", ["capture.vram=8GB is about a GPU's memory", "device=cpu has none"]),
        ("capture.batch=0", ["capture.batch=0", "at least 1"]),
        ("prompts.calibration.path=nowhere.jsonl", ["nowhere.jsonl does not exist"]),
    ],
)
def test_settings_are_refused_before_anything_runs(compress, store_root, change, parts):
    """`plan` takes the same way up to a stage's check and up to its making."""
    for verb in ("plan", "compress") if change in ("rank.r=12", "rank.r=1024") else ("compress",):
        refused(compress(*change.split(), verb=verb), *parts)
        assert not published(store_root)


def test_a_config_that_is_not_there(compress, store_root):
    said = compress("method=magic")
    assert said.status == 2
    assert "magic" in said.err and "dirotq_dense" in said.err
    assert not published(store_root)


def test_more_prompts_than_there_are(compress, store_root):
    refused(compress("prompts.calibration.count=9"), "holds 8 prompts", "9 were asked for")
    assert not published(store_root)


@pytest.mark.parametrize("verb", ["plan", "compress"])
def test_a_pickle_checkpoint(compress, own_folder, verb):
    (weights,) = (own_folder / "transformer").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    refused(compress(f"model.path='{own_folder}'", verb=verb), "pickle", "safe_serialization=True")


def test_a_folder_that_is_no_pipeline(compress, tmp_path):
    (tmp_path / "photos").mkdir()
    refused(compress(f"model.path={tmp_path / 'photos'}"), "no diffusers pipeline", "model_index")


def test_a_transformer_nobody_describes(compress, own_folder):
    config = own_folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "MyDiT"}))
    refused(compress(f"model.path='{own_folder}'"), "'MyDiT'", "flux (FluxTransformer2DModel)")


def test_an_already_packed_model(compress, packed_folder):
    refused(compress(f"model.path={packed_folder}"), "already quantized", "16-bit model")


def test_weights_that_are_not_finite_stop_at_capture(compress, own_folder, store_root):
    (weights,) = (own_folder / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["single_transformer_blocks.0.attn.to_q.weight"][1, 1] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    said = compress(f"model.path='{own_folder}'")
    refused(said, "site single_transformer_blocks.0.proj_out", "not finite")
    assert not published(store_root)


def test_finished_stages_survive_the_failure_of_a_later_one(compress, made, store_root):
    made("basis")
    refused(compress("fuse.layer_tolerance=1e-30"), "fuse.layer_tolerance=1e-30")
    assert published(store_root) == ["basis", "capture", "gptq", "rank"]


def test_a_changed_byte_of_an_artifact(compress, made, store_root):
    made("basis")
    (file,) = store_root.glob("basis/*/data/sites/*.qkv.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused(compress("until=gptq"), "damaged", file.name, "sha256", "dirotq verify --remove")


def test_a_store_of_a_newer_dirotq(compress, made, store_root):
    made("capture")
    marker = store_root / "dirotq-store.json"
    marker.write_text(json.dumps({"schema": 99}))
    refused(compress(), "schema 99", "Upgrade DiRotQ")


def test_a_gpu_that_is_not_there(compress):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    refused(compress("device=cuda"), "device=cuda", "device=cpu")


def test_a_device_that_does_not_exist(compress):
    refused(compress("device=gpu"), "device=gpu", "cuda")


def test_the_model_may_move_between_runs(compress, made, own_folder, store_root):
    made("basis")
    assert compress(f"model.path='{own_folder}'", "until=rank").status == 0
    assert published(store_root) == ["basis", "capture", "rank"]
    assert len(list(store_root.glob("capture/*"))) == 1


@pytest.fixture
def generate(capsys):
    """``dirotq generate`` in this process."""

    def call(folder) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(["generate", str(folder), "--prompt", "dots", "--device", "cpu"])
        return Said(left.value.code, capsys.readouterr().err)

    return call


def test_a_truncated_packed_model(generate, packed_folder):
    (weights,) = (packed_folder / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(generate(packed_folder), weights.name, "changed", "Download", "dirotq compress")
    (packed_folder / SUMS).unlink()
    refused(generate(packed_folder), weights.name, "not written to its end", "dirotq compress")


def test_a_packed_model_whose_scales_are_not_finite(generate, packed_folder):
    (weights,) = (packed_folder / "transformer").glob("*.safetensors")
    tensors, name = load_file(weights), "transformer_blocks.0.ff.net.2.wscale"
    tensors[name][0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    write_sums(packed_folder)
    refused(generate(packed_folder), name, "NaN or infinity", "dirotq compress")
