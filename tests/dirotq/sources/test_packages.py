"""Packages that a folder needs: they are missed here, or made to be."""

import importlib
import logging
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import diffusers
import pytest
import transformers
from damaged import *  # noqa: F403
from damaged import edit
from sentencepiece import SentencePieceTrainer
from transformers.utils import DummyObject

from dirotq.errors import UnsupportedError
from dirotq.sources.completeness import refuse_incomplete
from dirotq.sources.packages import CLEANERS, OPTIONAL, installed, refuse_missing_packages

FUNCTION = re.compile(r"^def (\w+)(.*\n(?:(?:[ )].*)?\n)*)", re.MULTILINE)
"""Name and text of one that stands alone in a module."""
WITH_VIDEOS = ["image_processor", "tokenizer", "video_processor"]


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """None of these is installed, whatever there is."""
    monkeypatch.setattr("dirotq.sources.packages.installed", lambda package: False)


def refused(folder, *said, **how):
    with pytest.raises(UnsupportedError, match="needs packages") as error:
        refuse_incomplete(folder, "the model", **how)
    for part in said:
        assert part in str(error.value)
    assert "ownload" not in str(error.value)  # which would not help


def vocabulary(folder, part, cls, file):
    """Leave a tokenizer this vocabulary alone, as those of PixArt-Sigma are published."""
    edit(folder / "model_index.json", **{part: ["transformers", cls]})
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / part / name).unlink(missing_ok=True)
    (folder / part / file).write_bytes(b"x")


@pytest.mark.parametrize(
    "file, packages",
    [
        ("spiece.model", "sentencepiece and protobuf"),
        ("tokenizer.model", "sentencepiece and protobuf"),
        ("tiktoken.model", "tiktoken"),
        ("qwen.tiktoken", "tiktoken"),
    ],
)
def test_a_vocabulary_without_tokenizer_json(own, file, packages, monkeypatch):
    folder = own("flux")
    vocabulary(folder, "tokenizer_2", "T5Tokenizer", file)
    names = " ".join(sorted(packages.split(" and ")))
    refused(folder, f"the tokenizer_2 (T5Tokenizer) needs {packages}.", f"pip install {names}")
    monkeypatch.setattr("dirotq.sources.packages.installed", lambda package: True)
    refuse_missing_packages(folder, "the model")


def test_a_vocabulary_of_sentencepiece_is_read(own, tmp_path):
    folder, texts = own("flux"), tmp_path / "texts"
    vocabulary(folder, "tokenizer_2", "T5Tokenizer", "spiece.model")
    texts.write_text("a red circle left of a blue square\n" * 9)
    SentencePieceTrainer.train(
        input=texts, model_prefix=tmp_path / "spiece", vocab_size=20, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    shutil.copy(tmp_path / "spiece.model", folder / "tokenizer_2")
    tokenizer = transformers.T5Tokenizer.from_pretrained(folder / "tokenizer_2")
    assert tokenizer.decode(tokenizer("a red circle").input_ids) == "a red circle</s>"


def test_a_vocabulary_beside_tokenizer_json_is_not_read(own):
    folder = own("flux")
    (folder / "tokenizer_2" / "spiece.model").write_bytes(b"x")
    refuse_missing_packages(folder, "the model")


def test_a_processor_that_needs_torchvision(own, monkeypatch):
    """As published it has a part for videos, which transformers can't make without."""
    folder = own("qwen_image_edit")
    monkeypatch.setattr(transformers.Qwen2VLProcessor, "get_attributes", lambda: WITH_VIDEOS)
    monkeypatch.setattr(transformers.utils, "is_torchvision_available", lambda: False)
    refused(folder, "processor (Qwen2VLProcessor) needs torchvision", "of the build of your torch")
    monkeypatch.setattr(transformers.utils, "is_torchvision_available", lambda: True)
    refuse_missing_packages(folder, "the model")


@pytest.mark.parametrize("name", ["the pipeline", "a component"])
def test_classes_whose_places_libraries_keep(name, own, monkeypatch):
    """They stand for Kolors without sentencepiece, and for tokenizers that need it."""
    kept = DummyObject("Kept", (), {"_backends": ["torch", "gguf_of_tomorrow"]})
    folder = own("flux")
    if name == "the pipeline":
        monkeypatch.setattr(diffusers, "KeptPipeline", kept, raising=False)
        edit(folder / "model_index.json", _class_name="KeptPipeline")
        refused(folder, "the KeptPipeline needs gguf_of_tomorrow")
    else:
        monkeypatch.setattr("dirotq.sources.packages.class_named", lambda *entry: kept)
        edit(folder / "model_index.json", tokenizer=["transformers", "KeptTokenizer"])
        refused(folder, "the tokenizer (KeptTokenizer) needs gguf_of_tomorrow")


def test_what_a_pipeline_calls_without_looking(own, monkeypatch, caplog):
    """Wan's from a picture mends texts by ftfy; from a text it asks first."""
    folder = own("wan_i2v")
    module = importlib.import_module("diffusers.pipelines.wan.pipeline_wan_i2v")
    refuse_missing_packages(folder, "with the stand-in of the tiny pipeline")
    monkeypatch.delattr(module, "ftfy")
    refused(folder, "the WanImageToVideoPipeline needs ftfy", "pip install ftfy")
    with caplog.at_level(logging.WARNING):
        refuse_missing_packages(folder, "the model", prompts=False)
    assert "needs ftfy to encode texts" in caplog.text
    edit(folder / "model_index.json", _class_name="WanPipeline")
    refuse_missing_packages(folder, "the model")


def test_every_function_beside_a_pipeline_that_cleans_texts_is_known():
    folder, found = Path(diffusers.__file__).parent / "pipelines", set()
    for file in folder.glob("*/*.py"):
        functions = FUNCTION.findall(file.read_text())
        found |= {name for name, body in functions if "ftfy." in body}
    assert found == set(CLEANERS)


def test_what_is_installed(monkeypatch):
    assert installed("torch") and not installed("no_such_package")
    monkeypatch.setitem(sys.modules, "ftfy", ModuleType("ftfy"))  # has no spec
    assert installed("ftfy")
    monkeypatch.setitem(sys.modules, "google", None)
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    assert not installed("protobuf")
    assert {"ftfy", "tiktoken", "torchvision"} == OPTIONAL.keys()
