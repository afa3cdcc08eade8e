"""Pipelines that start from a picture, and negative prompts: what generation runs, calibrates."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import zarr
from PIL import Image
from tiny_line import LINE, run
from tiny_pipelines import PICTURED, family_folder

from dirotq.cli import main
from dirotq.errors import ConfigError
from dirotq.pipeline.build import build
from dirotq.pipeline.config import compose_config
from dirotq.sources.generation import generate
from dirotq.sources.prompts import Prompt


@pytest.fixture
def line(tiny_root, tmp_path):
    """The line on rows of a prompt file: ``line(folder, rows, "until=capture")``."""

    def configured(folder, rows, *more: str):
        file = tmp_path / "rows.jsonl"
        for index in range(8):
            colour = (30 * index, 128, 255 - 30 * index)
            Image.new("RGB", (48, 32 + 8 * index), colour).save(tmp_path / f"{index}.png")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = [
            f"model={folder}",
            f"prompts.calibration.path={file}",
            f"prompts.heldout.path={file}",
            f"store={tmp_path / 'store'}",
        ]
        return build(compose_config([*words, *LINE, *more], "dirotq.conf"))

    return configured


ROWS = [{"prompt": f"a star, number {i}", "image": f"{i}.png"} for i in range(8)]


def test_a_video_from_a_picture_runs_through(tiny_root, line):
    made = run(line(family_folder(tiny_root, "wan_i2v"), ROWS))
    # One prompt a call: three steps of six prompts in both branches, of which 12 are recorded.
    assert made["capture"].metrics["calls"] == 12
    assert made["fuse"].metrics["network_error"] < 1e-5
    assert made["validate"].metrics["psnr"] > 20


@pytest.mark.parametrize("name", ["qwen_image_edit", "qwen_image_edit_plus"])
def test_qwens_edits_run_through_and_generate(tiny_root, tmp_path, line, name):
    rows, pictures = ROWS, 1
    if name == "qwen_image_edit_plus":
        rows, pictures = [row | {"image": ["0.png", row["image"]]} for row in ROWS], 2
    made = run(line(family_folder(tiny_root, name), rows))
    moments = zarr.open_group(made["capture"].tree("moments.zarr"), mode="r")
    # Of 64 x 64 pixels, 4 x 4 tokens of the image and as many of each picture.
    assert moments["transformer_blocks.0.attn.qkv"].attrs["tokens"] == 12 * (1 + pictures) * 16
    assert made["fuse"].metrics["network_error"] < 1e-5
    assert made["validate"].metrics["psnr"] > 20
    words = ["generate", str(made["pack"].tree("model")), "--prompt", "snow", "--device", "cpu"]
    words += ["--image", str(tmp_path / "3.png"), "--out", str(tmp_path / "made.png")]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    with Image.open(tmp_path / "made.png") as image:
        assert image.size == (64, 64)


@pytest.mark.families
@pytest.mark.parametrize("name", PICTURED)
def test_flux_with_pictures_runs_through(tiny_root, line, name):
    rows = [row | ({"mask_image": row["image"]} if "fill" in name else {}) for row in ROWS]
    made = run(line(family_folder(tiny_root, name), rows))
    assert made["fuse"].metrics["network_error"] < 1e-5
    assert made["validate"].metrics["psnr"] > 20


def test_a_model_that_may_be_given_pictures_is_calibrated_with_those_of_its_prompts(
    tiny_root, line
):
    folder = family_folder(tiny_root, "qwen_image21")
    made = run(line(folder, ROWS, "until=capture"))
    moments = zarr.open_group(made["capture"].tree("moments.zarr"), mode="r")
    # Each picture is another's size, and its tokens and those of the text vary with it.
    with_pictures = moments["transformer_blocks.0.attn.qkv"].attrs["tokens"]
    own = run(line(folder, [{"prompt": row["prompt"]} for row in ROWS], "until=capture"))
    plain = zarr.open_group(own["capture"].tree("moments.zarr"), mode="r")
    assert with_pictures > plain["transformer_blocks.0.attn.qkv"].attrs["tokens"] + 12 * 8


def test_an_edit_model_is_calibrated_with_its_pictures_and_refused_without(folder, tmp_path, line):
    kontext = shutil.copytree(folder, tmp_path / "kontext")
    index = json.loads((kontext / "model_index.json").read_text())
    index["_class_name"] = "FluxKontextPipeline"
    (kontext / "model_index.json").write_text(json.dumps(index))
    sized = ("+model.call.max_area=1024", "+model.call._auto_resize=false", "until=capture")
    made = run(line(kontext, ROWS, *sized))
    moments = zarr.open_group(made["capture"].tree("moments.zarr"), mode="r")
    seen = moments["transformer_blocks.0.attn.qkv"].attrs["tokens"]
    own = run(line(folder, [{"prompt": row["prompt"]} for row in ROWS], "until=capture"))
    plain = zarr.open_group(own["capture"].tree("moments.zarr"), mode="r")
    assert seen > plain["transformer_blocks.0.attn.qkv"].attrs["tokens"]  # and of the picture
    with pytest.raises(ConfigError, match=r"FluxKontextPipeline starts from a picture, and 6 of 6"):
        line(kontext, [{"prompt": row["prompt"]} for row in ROWS], *sized)


def test_several_references_of_a_prompt_are_tokens_that_calibrate(tiny_root, line, tmp_path):
    flux2 = family_folder(tiny_root, "flux2")
    for name in ("a.png", "b.png"):  # the pipeline refuses smaller ones
        Image.new("RGB", (64, 64), "green").save(tmp_path / name)

    def tokens(*pictures):
        rows = [{"prompt": row["prompt"], "image": list(pictures)} for row in ROWS]
        made = run(line(flux2, rows, "until=capture"))
        moments = zarr.open_group(made["capture"].tree("moments.zarr"), mode="r")
        return moments["transformer_blocks.0.attn.qkv"].attrs["tokens"]

    one, two = tokens("a.png"), tokens("a.png", "b.png")
    own = {"prompt": "a star"}
    plain = run(line(flux2, [own | {"seed": i} for i in range(8)], "until=capture"))
    alone = zarr.open_group(plain["capture"].tree("moments.zarr"), mode="r")
    assert two > one > alone["transformer_blocks.0.attn.qkv"].attrs["tokens"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": []}, r"the image \[\] is no list of paths"),
        ({"image": ["0.png", 1]}, "is no list of paths"),
        ({"image": ["0.png", "gone.png"]}, "gone.png does not exist"),
        ({"image": ["0.png", "1.png"]}, "a list of pictures as image, and a WanImage"),
    ],
)
def test_lists_of_pictures_that_are_none_or_not_taken(tiny_root, line, row, said):
    rows = [{"prompt": one["prompt"]} | row for one in ROWS]
    with pytest.raises(ConfigError, match=said):
        line(family_folder(tiny_root, "wan_i2v"), rows)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "0.png"}, "has a column image, and a FluxPipeline starts from none"),
        ({"negative_prompt": 7}, "no text under 'negative_prompt', but 7"),
    ],
)
def test_columns_that_a_pipeline_has_no_use_for(folder, line, row, said):
    rows = [{"prompt": one["prompt"]} | row for one in ROWS]
    with pytest.raises(ConfigError, match=said):
        line(folder, rows)


def test_a_negative_prompt_of_the_model_or_of_the_row_turns_guidance_on(tiny_root, line):
    qwen = family_folder(tiny_root, "qwen_image")
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    wanted = ("capture.calls=1000", "until=capture")

    def calls(rows, *more):
        return run(line(qwen, rows, *wanted, *more))["capture"].metrics["calls"]

    assert calls(rows) == 6 * 3 * 2  # the family's negative prompt is a space
    assert calls(rows, "+model.call.negative_prompt=null") == 6 * 3
    own = [row | {"negative_prompt": "a square"} for row in rows]
    assert calls(own, "+model.call.negative_prompt=null") == 6 * 3 * 2


class Fake:
    def __call__(self, prompt, generator, output_type, image=None, negative_prompt=None):
        seen = image if isinstance(image, list) else [image]
        self.calls.append((prompt, len(seen), negative_prompt))
        return SimpleNamespace(images=torch.zeros(len(prompt), 3, 4, 4))

    def __init__(self):
        self.calls = []


class FakeImg2ImgPipeline(Fake):
    pass


class FakeTransparent:
    def __call__(self, output_type, **_):
        opaque = torch.tensor([0.0, 0.5, 1.0]).expand(1, 1, 1, 3)
        red = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1).expand(-1, -1, -1, 3)
        return SimpleNamespace(images=torch.cat([red, opaque], 1))


def test_transparent_images_are_compared_on_white():
    one = [Prompt("a", 0, None, {}, None)]
    made = generate(FakeTransparent(), one, {})
    assert made[0, :, 0].mT.tolist() == [[1, 1, 1], [1, 0.5, 0.5], [1, 0, 0]]
    assert generate(FakeTransparent(), one, {}, output="latent").shape == (1, 4, 1, 3)


def test_a_list_of_pictures_is_a_batch_to_some_and_one_prompts_references_to_others(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    rows = [Prompt(text, 0, None, {"image": str(tmp_path / "x.png")}, "dark") for text in "ab"]
    one_by_one, batched = Fake(), FakeImg2ImgPipeline()
    assert generate(one_by_one, rows, {"negative_prompt": "blur"}).shape[0] == 2
    assert one_by_one.calls == [(["a"], 1, ["dark"]), (["b"], 1, ["dark"])]
    generate(batched, rows, {})
    assert batched.calls == [(["a", "b"], 2, ["dark", "dark"])]
    with pytest.raises(ConfigError, match="has no negative_prompt, others of its batch"):
        generate(batched, [rows[0], Prompt("c", 0, None, rows[0].inputs)], {})
