"""A line whose own runs are smaller than its users' (model.sample), on two video experts."""

import json

import pytest
import torch
from family_line import family_line
from tiny_line import run
from tiny_pipelines import PIPELINES

from dirotq.errors import ConfigError
from dirotq.evaluate.images import read_images
from dirotq.models.call import load_probe
from dirotq.quantize.measure import plans_psnr
from dirotq.quantize.running import of_folder

SAMPLE = ("+model.sample.num_frames=1", "+model.sample.height=32")


@pytest.fixture(scope="module")
def made(tiny_root):
    return run(family_line(tiny_root, "wan22", *SAMPLE))


def test_calls_are_recorded_at_the_samples_size(made):
    shapes = {tuple(call.kwargs["hidden_states"].shape[2:]) for call in load_probe(made["capture"])}
    assert shapes == {(1, 4, 8)}  # frames, height, width of latents


def test_images_are_scored_at_the_samples_size(made):
    for stage, name in (("reference", "original"), ("validate", "packed")):
        assert read_images(made[stage].tree("images.zarr"), name, [0]).shape[-2:] == (32, 64)
    report = json.loads(made["validate"].file("report.json").read_text())
    assert report["size"] == [32, 64]
    assert report["settings"]["model.sample.num_frames"] == 1
    assert report["settings"]["model.call.num_frames"] == 5


def test_the_packed_folder_is_called_as_its_users_do(made):
    folder = made["pack"].tree("model")
    call = json.loads((folder / "generation.json").read_text())
    assert call.items() >= PIPELINES["wan22"].call.items()
    report = json.loads(made["validate"].file("report.json").read_text())
    assert report["running"] == of_folder(folder).reported()
    assert "'num_frames': 5" in (folder / "README.md").read_text()


def test_the_gate_of_a_measuring_rank_makes_samples(tiny_root, monkeypatch):
    calls = []

    def note(pipe, prompts, call):
        calls.append(call)
        return torch.zeros(len(prompts), 3, 8, 8)

    monkeypatch.setattr("dirotq.quantize.measure.generate", note)
    model = family_line(tiny_root, "wan22", *SAMPLE).steps[0].stage.model
    assert plans_psnr(model, [], None, ["x"], batch=1, device=torch.device("cpu")) == []
    assert [call["num_frames"] for call in calls] == [1]


def test_a_wrong_sample_is_refused_by_its_name(tiny_root):
    for word, said in (
        ("+model.sample.guidence_scale=2", r"model\.sample\.guidence_scale: WanPipeline takes no"),
        ("+model.sample.num_frames=0", r"model\.sample\.num_frames=0: use a whole number"),
        ("+model.sample.prompt=x", r"model\.sample\.prompt: DiRotQ gives prompt itself"),
    ):
        with pytest.raises(ConfigError, match=said):
            family_line(tiny_root, "wan22", word)
    with pytest.raises(
        ConfigError, match=r"has none: .*\(\+\+model\.sample\.guidance_scale_2=null"
    ):
        family_line(tiny_root, "wan", "+model.sample.guidance_scale_2=3.0")
    with pytest.raises(
        ConfigError, match=r"^model\.sample\.negative_prompt.*\+model\.sample\.true_"
    ):
        family_line(
            tiny_root, "qwen_image",
            "+model.sample.negative_prompt=x", "+model.sample.true_cfg_scale=1.0",
        )  # fmt: skip
