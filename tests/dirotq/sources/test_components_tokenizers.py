"""Tokenizers that lost their words, or have another model's."""

import json

import pytest
from damaged import *  # noqa: F403
from damaged import edit, refused

from dirotq.sources.completeness import refuse_incomplete


@pytest.mark.parametrize(
    ("family", "part"),
    [("flux", "tokenizer"), ("flux", "tokenizer_2"), ("sana", "tokenizer"), ("wan", "tokenizer"),
     ("qwen_image", "tokenizer"), ("flux2", "tokenizer")],
)  # fmt: skip
def test_a_tokenizer_without_its_vocabulary(own, family, part):
    folder = own(family)
    (folder / part / "tokenizer.json").unlink()
    refused(folder, f"{part} (", "has no tokenizer.json", weights=False)
    (folder / part / "tokenizer.json").write_text('{"version": "1.0"')
    refused(folder, f"{part} (", "can't be made of its folder")


def test_a_vocabulary_in_two_files(own):
    folder = own("flux2")
    part = folder / "tokenizer"
    model = json.loads((part / "tokenizer.json").read_text())["model"]
    (part / "tokenizer.json").unlink()
    (part / "vocab.json").write_text(json.dumps(model["vocab"]))
    refused(folder, "has no tokenizer.json (or vocab.json and merges.txt)")
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (part / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    refuse_incomplete(folder, "as Qwen's are published")


def test_a_tokenizer_that_knows_no_words(own):
    folder = own("pixart")
    file = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] = content["model"]["vocab"][:3]
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < 3]
    file.write_text(json.dumps(content))
    refused(folder, "tokenizer (T5Tokenizer)", "knows no words")


def test_a_tokenizer_of_another_encoder(own):
    folder = own("flux")
    for rows, said in ((20, "they belong to two models"), (10_000, "was lost in part")):
        edit(folder / "text_encoder_2" / "config.json", vocab_size=rows)
        refused(folder, "tokenizer_2 (T5Tokenizer)", f"{rows}", said, weights=False)
