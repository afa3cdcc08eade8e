"""The transformers backend on a random LLaVA of a few thousand parameters."""

import dataclasses
import json
import re
import shutil
import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dirotq.errors import ConfigError, UnsupportedError
from dirotq.evaluate.judging.local import LocalModel
from dirotq.evaluate.judging.questions import Correction, Pair
from dirotq.pipeline.stage import recipe

TEMPLATE = """\
{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}\
{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}
{% endfor %}assistant:"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    import transformers as t

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<e>", pad_token="<p>", extra_special_tokens=["<image>"]
    )
    processor = t.LlavaProcessor(
        image_processor=t.CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**size, num_hidden_layers=2, image_size=28, patch_size=14),
        text_config=t.LlamaConfig(
            **size, num_hidden_layers=1, vocab_size=len(tokenizer), max_position_embeddings=8192
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = t.LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = None  # so that every token asked for is made
    folder = tmp_path_factory.mktemp("vlm") / "tiny-llava"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def judge(folder):
    return LocalModel(path=str(folder), temperature=0.0, max_tokens=6, device="cpu")


def test_the_model_is_given_the_conversation_and_both_images(judge, rubric, pair, monkeypatch):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    seen = []
    generate = LlavaForConditionalGeneration.generate

    def spy(self, **inputs):
        seen.append(inputs)
        return generate(self, **inputs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", spy)
    pair = Pair(pair.prompt, torch.zeros(3, 28, 28), torch.ones(3, 28, 28))
    with judge.open(rubric, threading.Event()) as compare:
        first, again = (compare(pair, []).text for _ in range(2))
        compare(pair, [Correction("rubbish", "no JSON")])
    assert first == again != ""  # greedy
    assert "assistant" not in first  # the question is no part of the answer
    dark, bright = seen[0]["pixel_values"].mean((1, 2, 3))
    assert dark < 0 < bright
    tokenizer = AutoProcessor.from_pretrained(judge.path).tokenizer
    texts = [tokenizer.decode(inputs["input_ids"][0]) for inputs in seen]
    assert re.search(r"a red square.*Image A:(<image>)+Image B:(<image>)+", texts[0], re.DOTALL)
    assert "assistant: rubbish" in texts[2] and "no JSON" in texts[2]
    assert seen[0]["max_new_tokens"] == 6


def test_its_files_are_its_identity(judge, folder):
    assert recipe(judge) == recipe(dataclasses.replace(judge, device="auto"))
    assert recipe(judge) != recipe(dataclasses.replace(judge, temperature=0.5))
    assert "model.safetensors" in recipe(judge)["files"]
    assert str(folder) not in str(recipe(judge))
    assert judge.name == "tiny-llava"


def test_weights_behind_a_link_and_pickles_behind_an_index(judge, folder, tmp_path):
    mine = shutil.copytree(folder, tmp_path / "mine")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "x.jinja").write_text("x")
    (mine / "additional_chat_templates").symlink_to(tmp_path / "templates")
    linked = dataclasses.replace(judge, path=str(mine))
    assert "additional_chat_templates/x.jinja" in linked.identity()["files"]
    index = mine / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}))
    with pytest.raises(ConfigError, match=r"names pytorch_model\.bin.*can run code"):
        linked.check()


def test_no_folder(judge, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no model \(no config\.json\)"):
        dataclasses.replace(judge, path=str(tmp_path / "none")).check()


def test_no_vision_language_model(judge, rubric, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    other = dataclasses.replace(judge, path=str(tmp_path))
    with (
        pytest.raises(UnsupportedError, match="can't load a vision-language model"),
        other.open(rubric, threading.Event()),
    ):
        pass


@pytest.mark.parametrize("changes", [{"temperature": -1}, {"max_tokens": 0}])
def test_settings_out_of_range(judge, changes):
    with pytest.raises(ConfigError, match="use at least 0 and 1"):
        dataclasses.replace(judge, **changes)
