import pytest
import torch

from dirotq.errors import ConfigError
from dirotq.models.attribute_judge import AttributeJudge
from dirotq.pipeline.stage import recipe
from dirotq.prompts import Prompt


def test_identity_is_content_not_place(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_text("weights")
    here, there = (AttributeJudge(path=str(tmp_path / name)) for name in ("here", "there"))
    assert recipe(here) == recipe(there)
    (tmp_path / "there" / "model.safetensors").write_text("Weights")
    assert recipe(here) != recipe(there)


def test_a_folder_without_a_reader_says_how_to_go_without(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no attribute reader.*prompts\.reader=null"):
        AttributeJudge(path=str(tmp_path)).identity()


def test_prompts_without_attributes(tmp_path):
    prompts = [Prompt("a star", 1, {"objects": []}), Prompt("a star", 2)]
    with pytest.raises(ConfigError, match="1 of 2 held-out prompts carry no 'attributes'"):
        AttributeJudge(path=str(tmp_path)).accuracy(torch.zeros(2, 3, 8, 8), prompts)
