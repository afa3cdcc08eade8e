import json

import pytest

import dirotq as front_door


class FakePipeline:
    def __init__(self, folder, device):
        self.folder, self.device, self.calls = folder, device, []

    def __call__(self, prompt, *, generator, **settings):
        from PIL import Image

        self.calls.append((prompt, generator.initial_seed(), settings))
        return type("Output", (), {"images": [Image.new("RGB", (8, 8), "red")]})


@pytest.fixture
def loaded(monkeypatch):
    pipelines = []

    def load(folder, *, device):
        pipelines.append(FakePipeline(folder, device))
        return pipelines[-1]

    monkeypatch.setattr(front_door, "load", load, raising=False)
    return pipelines


def test_one_image_with_the_models_own_settings(dirotq, loaded, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text("{}")
    (model / "generation.json").write_text(json.dumps({"num_inference_steps": 20, "height": 64}))
    out = tmp_path / "new" / "x.png"
    args = [str(model), "--prompt", "a star", "--seed", "7", "--out", str(out), "--device", "cpu"]
    assert dirotq("generate", *args).status == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    dirotq("generate", *args, "--steps", "4")
    assert [pipeline.device for pipeline in loaded] == ["cpu", "cpu"]
    assert [pipeline.calls[0] for pipeline in loaded] == [
        ("a star", 7, {"num_inference_steps": 20, "height": 64}),
        ("a star", 7, {"num_inference_steps": 4, "height": 64}),
    ]


def test_an_artifact_is_a_model(dirotq, loaded, store, tmp_path):
    dirotq("compress")
    total = next(artifact for artifact in store.list() if artifact.stage == "total")
    out = tmp_path / "x.png"
    assert dirotq("generate", "total/", "--prompt", "x", "--out", str(out)).status == 0
    assert loaded[0].folder == total.data / "model"
    result = dirotq("generate", "numbers/", "--prompt", "x")
    assert result.status == 2
    assert "holds no model_index.json" in result.err


def test_a_folder_that_is_no_pipeline(dirotq, tmp_path):
    result = dirotq("generate", str(tmp_path), "--prompt", "x")
    assert result.status == 2
    assert "no diffusers pipeline" in result.err
