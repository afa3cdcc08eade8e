"""Whatever a stage reads from outside is looked at again, on disk, before it publishes."""

import shutil
from pathlib import Path

import pytest
from tiny_line import overrides

from dirotq.pipeline import dag
from dirotq.pipeline.build import build
from dirotq.pipeline.config import compose_config


@pytest.fixture
def line(own_folder, tiny_root, tmp_path):
    """The default line on copies of the model and the prompts, planned."""
    told = overrides(tiny_root, tmp_path / "store")
    for number, override in enumerate(told):
        name, _, value = override.partition("=")
        if name == "model":
            told[number] = f"model={own_folder}"
        elif name.endswith(".path"):
            copy = tmp_path / f"{name}.jsonl"
            told[number] = f"{name}={shutil.copyfile(value, copy)}"
    return build(compose_config(told, "dirotq.conf"))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def changed(line) -> dict[str, str]:
    found = {step.name: dag._changed(step, {}) for step in line.steps}
    return {name: text for name, text in found.items() if text}


@pytest.mark.parametrize(
    "name",
    [
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_changed_model_is_seen_by_every_stage_that_reads_it(line, own_folder, name):
    assert changed(line) == {}
    flip(own_folder / name)
    found = changed(line)
    assert set(found) == {step.name for step in line.steps}
    if name.endswith(".safetensors"):
        assert all(f"recipe.model.files.{name} (" in text for text in found.values())


def test_a_changed_prompt_file_is_seen(line, tmp_path):
    file = tmp_path / "prompts.heldout.path.jsonl"
    file.write_text(file.read_text().replace("square", "circle"))
    found = changed(line)
    assert {"reference", "validate"} <= set(found)
    assert "capture" not in found


def test_a_model_that_is_gone_is_seen(line, own_folder):
    shutil.rmtree(own_folder)
    assert set(changed(line)) == {step.name for step in line.steps}
