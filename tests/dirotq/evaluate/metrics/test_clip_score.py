"""A random CLIP of a few thousand parameters, built here and read from disk like a real one."""

import json
import shutil

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from dirotq.assets import tiny_flux
from dirotq.errors import ConfigError
from dirotq.evaluate.metrics.clip_score import ClipScore

CPU = torch.device("cpu")
TEXTS = ["a red star", "two small blue circles on white", "a green square, " * 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tokenizer, _ = tiny_flux.train_tokenizers(TEXTS)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text = tower | {
        "num_attention_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 12,
        "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = tower | {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


def test_scores_are_100_cosines(folder):
    metric = ClipScore(path=str(folder))
    metric.check()
    assert not metric.paired
    images = torch.rand(3, 3, 48, 40, generator=torch.Generator().manual_seed(0))
    meter = metric.open(CPU)
    meter.update(images[:1], TEXTS[:1], images[:1])
    meter.update(images[1:], TEXTS[1:], images[1:])  # the last one is longer than the model reads
    found = meter.compute()
    assert meter.compute() == []
    kinds = (CLIPModel, CLIPTokenizer, CLIPImageProcessorPil)
    model, tokenizer, processor = (kind.from_pretrained(folder) for kind in kinds)
    for score, image, text in zip(found, images, TEXTS, strict=True):
        words = tokenizer(text, truncation=True, max_length=12, return_tensors="pt")
        pixels = processor((image * 255).round().byte().numpy(), return_tensors="pt")
        out = model(**words, **pixels)
        cosine = torch.cosine_similarity(out.image_embeds, out.text_embeds).item()
        assert score == pytest.approx(100 * max(cosine, 0), abs=1e-3)
    assert len(set(found)) > 1 or max(found) == 0
    meter.update(images, TEXTS, images)
    assert meter.compute() == pytest.approx(found, abs=1e-3)  # whatever the batch


def test_opposite_embeddings_score_nothing(folder, tmp_path):
    opposite = shutil.copytree(folder, tmp_path / "opposite")
    model = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        model.text_projection.weight.neg_()
    model.save_pretrained(opposite)
    images = torch.rand(1, 3, 32, 32)
    scores = []
    for place in (folder, opposite):
        meter = ClipScore(path=str(place)).open(CPU)
        meter.update(images, TEXTS[:1], images)
        scores += meter.compute()
    assert min(scores) == 0 < max(scores)


def test_identity_is_every_file_that_decides(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert ClipScore(path=str(copy)).identity() == ClipScore(path=str(folder)).identity()
    config = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(config | {"do_center_crop": False}))
    assert ClipScore(path=str(copy)).identity() != ClipScore(path=str(folder)).identity()


def test_an_index_that_names_a_pickle(folder, tmp_path):
    mine = shutil.copytree(folder, tmp_path / "mine")
    index = mine / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}))
    with pytest.raises(ConfigError, match="can run code"):
        ClipScore(path=str(mine)).check()


def test_damaged_and_absent_weights(folder, tmp_path):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ConfigError, match=r"clip_score: .*damaged"):
        ClipScore(path=str(copy)).check()
    weights.unlink()
    with pytest.raises(ConfigError, match=r"holds no config\.json with \*\.safetensors"):
        ClipScore(path=str(copy)).check()
