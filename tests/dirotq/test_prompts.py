import json
from pathlib import Path

import pytest

from dirotq.errors import ConfigError
from dirotq.pipeline.stage import recipe
from dirotq.prompts import Prompt, PromptSet, resolve


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


def test_too_few_rows(jsonl):
    file = jsonl({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    with pytest.raises(ConfigError, match=r"holds 1 prompts from row 2 on, 5 were asked for"):
        prompts(file, start=2, count=5).load()
    with pytest.raises(ConfigError, match="0 were asked for"):
        prompts(file, count=0).load()


@pytest.mark.parametrize("row", [{"text": "a"}, {"prompt": None, "seed": 1}, {"prompt": 5}])
def test_a_row_without_a_text(jsonl, row):
    with pytest.raises(ConfigError, match=r"row 1: no text under 'prompt'.*each line is"):
        prompts(jsonl(row, {"prompt": "b"} | row)).load()
    with pytest.raises(ConfigError, match="row 2: no text"):
        prompts(jsonl({"prompt": "a"}, row), start=1, count=1).load()


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"no-such.*does not exist.*prompts\.calibration\.path"):
        prompts(tmp_path / "no-such.jsonl").load()


def test_identity_is_content_and_range_not_place(jsonl):
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    file = jsonl(*rows)
    assert recipe(prompts(file)) == recipe(prompts(jsonl(*rows, name="renamed.jsonl")))
    assert recipe(prompts(file)) != recipe(prompts(jsonl(*rows[:1], name="shorter.jsonl")))
    assert recipe(prompts(file)) != recipe(prompts(file, count=1))
    assert recipe(prompts(file)) != recipe(prompts(file, start=1))


def test_assets_ship_with_the_package():
    assert resolve("assets://prompts/general.jsonl").is_file()
    assert resolve("~/x") == Path.home() / "x"
