import json
import wave
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dirotq import generate


class FakePipeline:
    def __init__(self, folder, device, vram=None):
        self.folder, self.device, self.vram, self.calls = folder, device, vram, []

    def __call__(self, prompt, *, generator, **settings):
        from PIL import Image

        self.calls.append((prompt, generator.initial_seed(), settings))
        return type("Output", (), {"images": [Image.new("RGB", (8, 8), "red")]})


@pytest.fixture
def loaded(monkeypatch):
    pipelines = []

    def load(folder, *, device, vram):
        pipelines.append(FakePipeline(folder, device, vram))
        return pipelines[-1]

    monkeypatch.setattr("dirotq.loading.load", load)
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


def test_a_limit_of_gpu_memory_is_the_loaders(dirotq, loaded, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    args = [str(tmp_path), "--prompt", "x", "--out", str(tmp_path / "x.png")]
    assert dirotq("generate", *args, "--vram", "16GB").status == 0
    dirotq("generate", *args)
    assert [pipeline.vram for pipeline in loaded] == ["16GB", None]
    for more, says in (
        (("--vram", "much"), "'much' is no size in bytes"),
        (("--vram", "24"), "--vram: '24' is 24 bytes"),
        (("--vram", "16GB", "--compare"), "--vram and --compare"),
    ):
        result = dirotq("generate", *args, *more)
        assert result.status == 2 and says in result.err


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


class FakeVideoPipeline(FakePipeline):
    def __call__(self, prompt, *, generator, **settings):
        from PIL import Image

        self.calls.append((prompt, generator.initial_seed(), settings))
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
        return type("Output", (), {"frames": [frames]})


class Painter:
    """A pipeline of diffusers that paints into an image, by its signature."""

    def __call__(self, prompt=None, image=None, mask_image=None, num_inference_steps=50, scale=1.0):
        raise NotImplementedError


class Filmer:
    def __call__(self, prompt=None, num_frames: int = 81, guidance_scale: float = 5.0, **more):
        raise NotImplementedError


@pytest.fixture
def model(tmp_path, monkeypatch):
    """``model(cls, **generation)``: a folder whose pipeline class is ``cls``."""

    def make(cls=None, **generation):
        monkeypatch.setattr(generate, "pipeline_class", lambda index: cls)
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "model_index.json").write_text("{}")
        (folder / "generation.json").write_text(json.dumps(generation))
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--steps", "0"], "--steps 0: use a whole number from 1 on"),
        (["--steps", "-3"], "--steps -3: use a whole number"),
        (["--seed", str(2**64)], f"--seed {2**64}: use a whole number from 0 to {2**64 - 1}"),
        (["--seed", "-1"], "--seed -1"),
        (["--prompt", " "], "--prompt is empty"),
        (["--out", "x"], "--out x has no suffix"),
        (["--out", "x.docx"], "--out x.docx has the suffix .docx"),
        (["--out", "x.xbm"], "x.xbm has the suffix .xbm"),  # black and white only
        (["--out", "."], "--out . is a folder"),
        (["--out", "file/x.png"], "--out file/x.png: the folder file can't be made"),
        (["--device", "cuda:999"], "--device=cuda:999"),
        (["--device", "tpu"], "--device=tpu is unknown"),
        (["--image", "file"], "--image file can't be read as a picture"),
        (["--image", "nowhere.png"], "--image nowhere.png does not exist"),
        (["--fps", "0"], "--fps 0"),
        (["--fps", "8"], "--fps is about a video, and this model makes images"),
    ],
)
def test_what_no_model_can_do_is_said_before_one_is_loaded(
    dirotq, loaded, model, tmp_path, monkeypatch, args, says
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no image")
    result = dirotq("generate", model(), "--prompt", "x", *args)
    assert (result.status, says in result.err) == (2, True), result
    assert "Traceback" not in result.err
    assert loaded == []


def test_the_largest_seed_and_any_format_that_can_be_written(dirotq, loaded, model, tmp_path):
    folder = model()
    for suffix in (".png", ".JPG", ".webp", ".bmp"):
        out = tmp_path / f"x{suffix}"
        args = ["--prompt", "x", "--seed", str(2**64 - 1), "--out", str(out)]
        assert dirotq("generate", folder, *args).status == 0
        assert out.stat().st_size > 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "generation.json is damaged: expected a JSON object"),
        ("{", "generation.json is damaged: no valid JSON"),
        ('{"bogus": 1}', "generation.json.bogus: Painter takes no such argument"),
        ('{"num_inference_steps": 0}', "num_inference_steps=0: use a whole number from 1 on"),
        ('{"num_inference_steps": "4"}', "num_inference_steps='4': use a whole number"),
        ('{"prompt": "x"}', "DiRotQ gives prompt itself"),
    ],
)
def test_odd_settings_of_a_model(dirotq, loaded, model, text, says):
    folder = model(Painter)
    (Path(folder) / "generation.json").write_text(text)
    result = dirotq("generate", folder, "--prompt", "x")
    assert (result.status, says in result.err) == (2, True), result
    assert loaded == []


def test_a_painter_wants_an_image_and_a_mask(dirotq, loaded, model, tmp_path):
    from PIL import Image

    folder, picture = model(Painter), tmp_path / "in.png"
    Image.new("L", (16, 16)).save(picture)
    missing = dirotq("generate", folder, "--prompt", "x", "--image", str(picture))
    assert missing.status == 2
    assert "--mask FILE is missing (it takes --image FILE and --mask FILE)" in missing.err
    out = tmp_path / "x.png"
    args = ["--image", str(picture), "--mask", str(picture), "--out", str(out)]
    assert dirotq("generate", folder, "--prompt", "x", *args).status == 0
    ((_, _, settings),) = loaded[0].calls
    assert {name: image.mode for name, image in settings.items()} == {
        "image": "RGB", "mask_image": "RGB",
    }  # fmt: skip


def test_an_image_for_a_model_that_takes_none(dirotq, loaded, model, tmp_path):
    from PIL import Image

    picture = tmp_path / "in.png"
    Image.new("RGB", (16, 16)).save(picture)
    result = dirotq("generate", model(Filmer), "--prompt", "x", "--image", str(picture))
    assert "--image FILE: Filmer starts from no image" in result.err
    assert loaded == []


def test_a_video_is_an_animated_image(dirotq, model, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dirotq.loading.load", FakeVideoPipeline)
    folder = model(Filmer)
    assert dirotq("generate", folder, "--prompt", "x", "--fps", "8").out == "video.webp\n"
    assert dirotq("generate", folder, "--prompt", "x", "--out", "v.gif").status == 0
    for name in ("video.webp", "v.gif"):
        assert Image.open(name).n_frames == 3
    for name in ("v.mp4", "v.jpg"):
        refused = dirotq("generate", folder, "--prompt", "x", "--out", name)
        assert "a video is written as an animated image: use .webp" in refused.err
        assert "export_to_video" in refused.err
    monkeypatch.setattr(generate, "pipeline_class", lambda index: None)  # told by the result only
    assert dirotq("generate", folder, "--prompt", "x", "--out", "late.jpg").out == "late.webp\n"


def test_the_sound_of_a_video_lies_beside_it(dirotq, model, tmp_path, monkeypatch):
    class Loud(FakeVideoPipeline):
        vocoder = SimpleNamespace(config=SimpleNamespace(output_sampling_rate=8000))

        def __call__(self, *words, **settings):
            made = super().__call__(*words, **settings)
            made.audio = torch.zeros(1, 2, 4000)
            return made

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dirotq.loading.load", Loud)
    assert dirotq("generate", model(Filmer), "--prompt", "x").out == "video.webp\nvideo.wav\n"
    with wave.open("video.wav") as file:
        assert file.getnframes() / file.getframerate() == 0.5


def test_what_a_pipeline_refuses_is_no_traceback(dirotq, model, monkeypatch):
    class Picky(FakePipeline):
        def __call__(self, prompt, **settings):
            raise ValueError("`height` and `width` have to be divisible by 8")

    monkeypatch.setattr("dirotq.loading.load", Picky)
    result = dirotq("generate", model(), "--prompt", "x")
    assert result.status == 2
    assert "Picky refuses this call: `height` and `width` have to be divisible by 8" in result.err


def test_a_pipeline_saved_without_a_component_loads(tmp_path):
    """SD3 without its T5, whose entries in model_index.json are [null, null]."""
    from tiny_pipelines import family_folder

    from dirotq.sources.opening import open_pipeline

    source = family_folder(tmp_path, "sd3")
    pipe = open_pipeline(source, torch.float32, torch.device("cpu"))
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path / "smaller")
    again = open_pipeline(tmp_path / "smaller", torch.float32, torch.device("cpu"))
    assert again.text_encoder_3 is None
    settings = json.loads((source / "generation.json").read_text())
    assert again("x", **settings).images[0].size


def test_a_transparent_image_is_saved_as_its_format_allows(dirotq, monkeypatch, tmp_path):
    from PIL import Image

    class Transparent(FakePipeline):
        def __call__(self, prompt, *, generator, **settings):
            return type("Output", (), {"images": [Image.new("RGBA", (8, 8), (255, 0, 0, 0))]})

    monkeypatch.setattr("dirotq.loading.load", lambda folder, **_: Transparent(folder, "cpu"))
    (tmp_path / "model_index.json").write_text("{}")
    for name, colour in (("x.png", (255, 0, 0, 0)), ("x.jpg", (255, 255, 255))):
        words = [str(tmp_path), "--prompt", "a star", "--out", str(tmp_path / name)]
        assert dirotq("generate", *words, "--device", "cpu").status == 0
        with Image.open(tmp_path / name) as image:
            assert image.getpixel((4, 4)) == colour


def test_a_place_without_a_model(dirotq, loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.safetensors").touch()
    for name, says in (
        (str(tmp_path / "gone"), "gone does not exist; give a packed folder"),
        ("a.safetensors", "a.safetensors is a file; give a packed folder"),
        ("pack/1f3a", "no artifact matches 'pack/1f3a'"),
    ):
        assert says in dirotq("generate", name, "--prompt", "x").err
    assert loaded == []
