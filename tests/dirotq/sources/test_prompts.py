import json
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from hydra.utils import instantiate
from PIL import Image

import dirotq.sources.hub
import dirotq.sources.prompts
from dirotq.errors import ConfigError
from dirotq.pipeline.build import build
from dirotq.pipeline.config import compose_config
from dirotq.pipeline.stage import recipe
from dirotq.sources.prompts import MOST_PICTURES, Prompt, PromptSet, refuse_shared, resolve


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows: dict, name: str = "prompts.jsonl") -> Path:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return write


def prompts(path: Path | str, start: int = 0, count: int = 2) -> PromptSet:
    return PromptSet(path=str(path), start=start, count=count)


def test_rows_from_start(jsonl):
    file = jsonl(*({"prompt": f"a {i}", "seed": 10 * i} for i in range(5)))
    assert prompts(file, start=1, count=3).load() == [
        Prompt("a 1", 10),
        Prompt("a 2", 20),
        Prompt("a 3", 30),
    ]


def test_attributes_come_along(jsonl):
    shown = {"background": "green", "objects": [{"shape": "star", "colour": "blue"}]}
    file = jsonl({"prompt": "a star", "seed": 1, "attributes": shown})
    (prompt,) = prompts(file, count=1).load()
    assert prompt.attributes == shown


def test_a_row_without_a_seed_gets_its_row_number(jsonl):
    file = jsonl({"prompt": "a"}, {"prompt": "b", "seed": 7}, {"prompt": "c"}, {"prompt": "d"})
    assert [p.seed for p in prompts(file, count=4).load()] == [0, 7, 2, 3]
    assert [p.seed for p in prompts(file, start=2).load()] == [2, 3]


def test_no_rows_at_all(jsonl):
    """Held-out prompts begin at row 96 unless told otherwise: a short file has none."""
    message = r"holds no prompts from row 1 on, 2 were asked for; rows are counted from 0: .*start"
    with pytest.raises(ConfigError, match=message):
        prompts(jsonl({"prompt": "a"}), start=1, count=2).load()
    with pytest.raises(ConfigError, match=r"holds no prompts from row 0 on.*a file with prompts"):
        prompts(jsonl(), start=0, count=2).load()


def test_too_few_rows(jsonl):
    file = jsonl({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    with pytest.raises(ConfigError, match=r"holds 1 prompts from row 2 on, 5 were asked for"):
        prompts(file, start=2, count=5).load()
    with pytest.raises(ConfigError, match="no prompts were asked for"):
        prompts(file, count=0).load()


@pytest.mark.parametrize("row", [{"prompt": None, "seed": 1}, {"prompt": 5}, {"prompt": " "}])
def test_a_row_without_a_text(jsonl, row):
    with pytest.raises(ConfigError, match=r"row 1: no text under 'prompt', but"):
        prompts(jsonl(row, row)).load()
    with pytest.raises(ConfigError, match="row 2: no text"):
        prompts(jsonl(row, row), start=1, count=1).load()


def test_a_column_by_another_name(jsonl):
    file = jsonl({"caption": "a", "id": 1}, {"caption": "b", "id": 2})
    with pytest.raises(
        ConfigError, match=r"no column 'prompt', there are \['caption', 'id'\].*\.column="
    ):
        prompts(file).load()
    named = PromptSet(path=str(file), start=0, count=2, column="caption")
    assert [p.text for p in named.load()] == ["a", "b"]


def test_of_several_captions_the_first(jsonl):
    assert prompts(jsonl({"prompt": ["a", "b"]}), count=1).load() == [Prompt("a", 0)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", "a cat\na dog\n"),
        ("x.csv", "seed,prompt\n0,a cat\n1,a dog\n"),
        ("x.json", '[{"prompt": "a cat"}, {"prompt": "a dog"}]'),
        ("x.json", '{"id7": {"prompt": "a cat", "category": "pets"}, "id9": {"prompt": "a dog"}}'),
        ("x.yaml", "'0': a cat\n'1': a dog\n"),
    ],
)
def test_other_files(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert prompts(tmp_path / name).load() == [Prompt("a cat", 0), Prompt("a dog", 1)]
    assert prompts(tmp_path / name, start=1, count=1).load() == [Prompt("a dog", 1)]


def test_parquet(tmp_path):
    datasets.Dataset.from_dict({"prompt": ["a", "b", "c"], "seed": [5, 6, 7]}).to_parquet(
        tmp_path / "x.parquet"
    )
    assert prompts(tmp_path / "x.parquet", start=1).load() == [Prompt("b", 6), Prompt("c", 7)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"prompt": "a"}\nnot json\n', "can't be read"),
        ("x.json", "{", "can't be read"),
        ("x.json", "5", "neither a list nor a mapping"),
        ("x.yaml", "a: [", "can't be read"),
        ("x.txt", "a\n\nb\n", "row 2: no text"),
        ("x.jsonl", "", "holds no prompts from row 0"),
        ("x.jsonl", '{"prompt": "a", "seed": "x"}\n' * 2, "seed 'x' is no whole number"),
        ("x.zip", "a", r"prompts are read from \.jsonl, .* not from \.zip"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        prompts(tmp_path / name).load()


def test_images_of_editing_pipelines(jsonl, tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "in.png")
    file = jsonl({"prompt": "a", "image": "in.png", "mask_image": str(tmp_path / "in.png")})
    one = prompts(file, count=1)
    image = str(tmp_path / "in.png")
    assert one.load() == [Prompt("a", 0, None, {"image": image, "mask_image": image})]
    several = prompts(jsonl({"prompt": "a", "image": ["in.png", "in.png"]}), count=1)
    assert several.load() == [Prompt("a", 0, None, {"image": (image, image)})]
    assert len(several.identity()["images"]) == 1  # one file
    before = recipe(one)
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "in.png")
    assert recipe(one) != before
    assert "transparent" not in one.identity()  # as it was before they were laid on white
    Image.new("RGBA", (16, 16), "blue").save(tmp_path / "in.png")
    assert one.identity()["transparent"] == "white"
    with pytest.raises(ConfigError, match=r"row 1: the image .*gone\.png does not exist"):
        prompts(jsonl({"prompt": "a", "image": "gone.png"}), count=1).load()
    with pytest.raises(ConfigError, match=r"row 1: the image https://x\.org/a\.png is an address"):
        prompts(jsonl({"prompt": "a", "image": "https://x.org/a.png"}), count=1).load()
    many = prompts(jsonl({"prompt": "a", "image": ["in.png"] * MOST_PICTURES}), count=1)
    assert len(many.load()[0].inputs["image"]) == MOST_PICTURES
    with pytest.raises(ConfigError, match=r"row 1: 17 pictures as image; .* at most 16"):
        prompts(jsonl({"prompt": "a", "image": ["in.png"] * (MOST_PICTURES + 1)}), count=1).load()
    with pytest.raises(ConfigError, match=rf"the image {tmp_path} is a folder"):
        prompts(jsonl({"prompt": "a", "image": str(tmp_path)}), count=1).load()


@pytest.mark.parametrize("negative", [["dark", "blurred"], [], 7])
def test_negative_prompts_that_are_no_text(jsonl, negative):
    with pytest.raises(ConfigError, match="no text under 'negative_prompt'"):
        prompts(jsonl({"prompt": "a", "negative_prompt": negative}), count=1).load()


# The hub


@pytest.fixture
def on_hub(monkeypatch, tmp_path):
    """datasets and files of org/set, at one commit; what was asked for."""
    asked = []

    class Api:
        def repo_info(self, repo, *, revision, repo_type, timeout):
            assert repo_type == "dataset"
            return huggingface_hub.hf_api.DatasetInfo(id=repo, sha="c" * 40)

    def load_dataset(path, subset, *, split, revision, streaming):
        asked.append((path, subset, split, revision, streaming))
        if split == "nix":
            raise ValueError("Bad split: nix. Available splits: ['train']")
        if split == "down":
            raise ConnectionError("no route")
        rows = {"caption": ["a", "b", "c"], "image": [b"1", b"2", b"3"]}
        return datasets.Dataset.from_dict(rows).to_iterable_dataset()

    def download(repo, file, *, repo_type, revision):
        asked.append((repo, file, repo_type, revision))
        (tmp_path / "meta.json").write_text('{"x": {"prompt": "a"}, "y": {"prompt": "b"}}')
        return str(tmp_path / "meta.json")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dirotq.sources.hub._commit.cache_clear()
    dirotq.sources.prompts._load.cache_clear()
    return asked


def hub_set(path="org/set", **fields) -> PromptSet:
    return PromptSet(**{"path": path, "start": 1, "count": 2, "column": "caption"} | fields)


def test_a_dataset_of_the_hub_is_streamed(on_hub):
    assert hub_set(subset="small").load() == [Prompt("b", 1), Prompt("c", 2)]
    assert on_hub == [("org/set", "small", "train", "c" * 40, True)]


def test_identity_of_a_dataset_is_its_commit(on_hub):
    assert hub_set().identity() == {
        "repo": "org/set", "commit": "c" * 40, "subset": None, "split": "train",
        "column": "caption", "start": 1, "count": 2,
    }  # fmt: skip
    assert on_hub == []  # a plan reads no rows
    assert recipe(hub_set(f"org/set@{'c' * 40}")) == recipe(hub_set())
    assert recipe(hub_set(f"org/set@{'d' * 40}")) != recipe(hub_set())


def test_a_file_in_a_dataset(on_hub):
    listed = hub_set("org/set/meta.json", start=0, column="prompt")
    assert listed.load() == [Prompt("a", 0), Prompt("b", 1)]
    assert on_hub == [("org/set", "meta.json", "dataset", "c" * 40)]
    assert listed.identity()["file"] == "meta.json"


def test_what_a_dataset_answers_is_explained(on_hub):
    with pytest.raises(ConfigError, match=r"Available splits: \['train'\]"):
        hub_set(split="nix").load()
    with pytest.raises(ConfigError, match=r"can't be reached \(no route\).*give that file as path"):
        hub_set(split="down").load()
    with pytest.raises(ConfigError, match=r"no column 'prompt', there are \['caption', 'image'\]"):
        hub_set(column="prompt").load()


def test_calibration_and_heldout_prompts_are_apart():
    calibration = [Prompt("A red  Circle", 1), Prompt("b", 2), Prompt("b", 3)]
    refuse_shared(calibration, [Prompt("a blue circle", 1)])
    with pytest.raises(ConfigError, match=r"1 of 2 held-out prompts .*'a RED circle '"):
        refuse_shared(calibration, [Prompt("c", 1), Prompt("a RED circle ", 9)])
    same_words = Prompt("b", 2, None, {"image": "/another.png"})
    refuse_shared(calibration, [same_words])


def test_a_line_is_refused_before_it_runs():
    with pytest.raises(ConfigError, match="8 of 8 held-out prompts are calibration prompts too"):
        build(compose_config(["prompts=general", "prompts.heldout.start=0"], "dirotq.conf"))


def test_the_sets_that_ship_are_apart():
    for name in ("general", "tiny_flux"):
        cfg = compose_config([f"prompts={name}"], "dirotq.conf").prompts
        calibration, heldout = (instantiate(cfg[part]).load() for part in cfg if part != "reader")
        refuse_shared(calibration, heldout)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"no-such.*does not exist.*prompts\.calibration\.path"):
        prompts(tmp_path / "no-such.jsonl").load()


def test_identity_is_content_and_range_not_place(jsonl):
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    file, other = jsonl(*rows), jsonl(*rows[::-1], name="other.jsonl")
    assert recipe(prompts(file)) == recipe(prompts(jsonl(*rows, name="renamed.jsonl")))
    assert recipe(prompts(file)) != recipe(prompts(other))
    assert recipe(prompts(file)) != recipe(prompts(file, count=1))
    assert recipe(prompts(file)) != recipe(prompts(file, start=1))


def test_assets_ship_with_the_package():
    assert resolve("assets://prompts/general.jsonl").is_file()
    assert resolve("~/x") == Path.home() / "x"
