import json
import shutil

import pytest
import torch
from tiny_sources import *  # noqa: F403
from tiny_sources import model, tensors_of

import dirotq.models.variant
from dirotq.models.variant import shards
from dirotq.pipeline.stage import recipe


def test_the_folder_is_a_pipeline_made_once(folder, lora, cache, monkeypatch):
    changed = model(folder, lora=str(lora()))
    made = changed.folder()
    assert made.parent == cache / "sources"
    monkeypatch.setattr(dirotq.models.variant, "_write_transformer", None)
    assert changed.folder() == made
    assert sorted(p.name for p in made.iterdir()) == sorted(p.name for p in folder.iterdir())
    pipe = changed.pipeline(torch.float32, torch.device("cpu"))
    assert type(pipe).__name__ == "FluxPipeline"
    assert changed.call_arguments() == model(folder).call_arguments()
    assert [p.name for p in made.parent.iterdir() if p.name.startswith(".")] == []


def test_a_plan_writes_nothing(folder, lora, cache):
    changed = model(folder, lora=str(lora()))
    recipe(changed)
    assert changed.sites() == model(folder).sites()
    assert not (cache / "sources").exists()


def test_a_failed_write_leaves_nothing_behind(folder, lora, cache, monkeypatch):
    def fails(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(dirotq.models.variant, "_link_rest", fails)
        with pytest.raises(OSError, match="no space"):
            model(folder, lora=str(lora())).folder()
    assert [p for p in (cache / "sources").iterdir() if p.is_dir()] == []
    assert model(folder, lora=str(lora())).folder().is_dir()


def test_a_lost_link_is_mended(folder, lora):
    changed = model(folder, lora=str(lora()))
    made = changed.folder()
    (made / "vae" / "gone").symlink_to(made / "nowhere")
    assert changed.folder() == made
    assert not (made / "vae" / "gone").is_symlink()


def test_shards_are_small_and_in_order(folder, lora, monkeypatch):
    monkeypatch.setattr(dirotq.models.variant, "SHARD", 50_000)
    made = model(folder, lora=str(lora())).folder()
    files = sorted((made / "transformer").glob("*.safetensors"))
    index = made / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    assert len(files) == len(set(json.loads(index.read_text())["weight_map"].values())) > 3
    assert tensors_of(made).keys() == tensors_of(folder).keys()
    assert model(folder, lora=str(lora())).weights().files.keys() == tensors_of(folder).keys()


def test_shard_plan():
    sizes = {"a": 3, "b": 3, "c": 9, "d": 1}
    assert list(shards(sizes, 6).values()) == [["a", "b"], ["c"], ["d"]]
    assert list(shards(sizes, 16)) == ["diffusion_pytorch_model.safetensors"]
    assert next(iter(shards(sizes, 6))) == "diffusion_pytorch_model-00001-of-00003.safetensors"


def test_identity_of_a_variant(folder, lora, tmp_path):
    one = model(folder, lora=str(lora()))
    moved = shutil.copy(lora(), tmp_path / "moved.safetensors")
    assert recipe(one) == recipe(model(folder, lora=[{"path": str(moved), "weight": 1}]))
    assert recipe(one) != recipe(model(folder))
    assert recipe(one) != recipe(model(folder, lora=[{"path": str(moved), "weight": 0.5}]))
    assert recipe(model(folder, lora=[])) == recipe(model(folder))
