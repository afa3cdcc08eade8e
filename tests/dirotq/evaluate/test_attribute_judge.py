import pytest
import torch

from dirotq.errors import ConfigError
from dirotq.evaluate.attribute_judge import AttributeJudge
from dirotq.evaluate.attribute_reader import AttributeReader, caption_accuracy
from dirotq.pipeline.stage import recipe
from dirotq.sources.prompts import Prompt, PromptSet, resolve


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
        AttributeJudge(path=str(tmp_path)).counts(torch.zeros(2, 3, 8, 8), prompts)


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"objects": 5, "background": {"kind": "plain", "colors": ["red"]}},
        {"objects": [], "background": {"kind": "plain", "colors": []}},
        {"objects": [], "background": {"kind": "plaid", "colors": ["red"]}},
        {"objects": [{"position": "top"}], "background": None},
    ],
)
def test_attributes_of_another_kind(attributes):
    judge = AttributeJudge(path="assets://attribute-reader")
    with pytest.raises(ConfigError, match=r"'a star' are not those .*prompts\.reader=null"):
        judge.refuse_silent([Prompt("a star", 1, attributes)])


def test_batches_add_up_to_the_whole():
    judge = AttributeJudge(path="assets://attribute-reader")
    prompts = PromptSet(path="assets://prompts/tiny_heldout.jsonl", start=0, count=6).load()
    images = torch.rand(6, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    whole = judge.counts(images, prompts)
    parts = [judge.counts(images[i : i + 2], prompts[i : i + 2]) for i in (0, 2, 4)]
    for kind, count in whole.items():
        assert count.shape == (6, 2)
        assert (count[:, 0] <= count[:, 1]).all()
        assert torch.equal(torch.cat([part[kind] for part in parts]), count)
    reader = AttributeReader.load(resolve(judge.path))
    attributes = [prompt.attributes for prompt in prompts]
    assert judge.totals(whole) == caption_accuracy(reader, images, attributes)
    torch.testing.assert_close(judge.features(images[:2]), reader.features(images)[:2])
