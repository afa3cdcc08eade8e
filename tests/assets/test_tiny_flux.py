"""tiny-flux is a complete FluxPipeline: built, saved, loaded, run; and the shipped one draws."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

import dirotq.assets
from dirotq.assets import evaluate
from dirotq.assets.captions import CLIP_LENGTH, T5_LENGTH, captions_of
from dirotq.assets.denoisers import FluxDenoiser
from dirotq.assets.make_prompts import PROMPTS
from dirotq.assets.scenes import sample_scenes
from dirotq.assets.tiny_flux import (
    GENERATION,
    build_autoencoder,
    save_pipeline,
    train_tokenizers,
)
from dirotq.assets.training_pool import tokenize
from dirotq.evaluate.attribute_reader import AttributeReader, caption_accuracy

HOME = Path(dirotq.assets.__file__).parent
SHIPPED = HOME / "tiny-flux"
needs_weights = pytest.mark.skipif(
    not (SHIPPED / "model_index.json").exists(), reason="assets/tiny-flux is not there"
)

CAPTIONS = ("a large red star", "two small blue stars", "a green square, dots")


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return captions_of(sample_scenes(1500, torch.Generator().manual_seed(1)), seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, captions: list[str]) -> Path:
    """An untrained tiny-flux on disk."""
    folder = tmp_path_factory.mktemp("untrained")
    torch.manual_seed(0)
    tokenizers = train_tokenizers(captions)
    networks = FluxDenoiser.untrained(tokenizers)
    save_pipeline(
        folder,
        tokenizers=tokenizers,
        autoencoder=build_autoencoder(),
        clip=networks.clip,
        t5=networks.t5,
        transformer=networks.transformer,
        shift=2.0,
    )
    return folder


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> FluxPipeline:
    return evaluate.load_pipeline(folder, torch.device("cpu"), torch.float32)


def test_no_caption_is_cut_off(pipeline: FluxPipeline, captions: list[str]) -> None:
    for tokenizer, limit in ((pipeline.tokenizer, CLIP_LENGTH), (pipeline.tokenizer_2, T5_LENGTH)):
        assert max(len(ids) for ids in tokenizer(captions).input_ids) <= limit
        assert tokenizer.unk_token_id not in tokenizer(captions[0]).input_ids[:-1]


def test_the_same_captions_make_the_same_vocabulary() -> None:
    """The trainer's own numbers of word-ending letters differ each time: a hash map orders them."""
    found = [train_tokenizers(CAPTIONS)[0] for _ in range(3)]
    numbers = found[0].get_vocab()
    assert all(clip.get_vocab() == numbers for clip in found)
    ends = [token for token in numbers if token.endswith("</w>") and len(token) == 5]
    assert sorted(ends, key=numbers.__getitem__) == sorted(ends)
    assert found[0].tokenize("a large star") == ["a</w>", "large</w>", "star</w>"]


@torch.no_grad()
def test_training_tokenizes_as_the_pipeline_does(
    pipeline: FluxPipeline, captions: list[str]
) -> None:
    clip_ids, t5_ids = tokenize(captions[:3], (pipeline.tokenizer, pipeline.tokenizer_2))
    embeds, pooled, _ = pipeline.encode_prompt(captions[:3], max_sequence_length=T5_LENGTH)
    torch.testing.assert_close(embeds, pipeline.text_encoder_2(torch.from_numpy(t5_ids))[0])
    clip = pipeline.text_encoder(torch.from_numpy(clip_ids))
    torch.testing.assert_close(pooled, clip.pooler_output)


def test_saved_folder_is_in_pieces_and_in_bfloat16(folder: Path) -> None:
    assert json.loads((folder / "generation.json").read_text()) == GENERATION
    assert all(f.stat().st_size <= 9 * 10**6 for f in folder.rglob("*") if f.is_file())
    half = FluxPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    total = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
    parts = (half.transformer, half.vae, half.text_encoder, half.text_encoder_2)
    count = sum(p.numel() for part in parts for p in part.parameters())
    assert 2 * count <= total <= 2.05 * count


def test_same_prompt_and_seed_give_the_same_image_in_any_batch(pipeline: FluxPipeline) -> None:
    rows = [{"prompt": "a red star", "seed": 1}, {"prompt": "a red star", "seed": 1}]
    settings = GENERATION | {"num_inference_steps": 2}
    images = evaluate.generate(pipeline, rows, settings, batch=1)
    assert images.shape == (2, 3, 128, 128)
    assert torch.equal(images[0], images[1])
    together = evaluate.generate(pipeline, rows, settings, batch=2)
    torch.testing.assert_close(together, images, atol=1e-4, rtol=0)


@needs_weights
def test_shipped_model_draws_what_captions_say() -> None:
    rows = [json.loads(line) for line in (PROMPTS / "tiny_heldout.jsonl").open()][:4]
    settings = json.loads((SHIPPED / "generation.json").read_text())
    pipeline = evaluate.load_pipeline(SHIPPED, torch.device("cpu"), torch.float32)
    images = evaluate.generate(pipeline, rows, settings, batch=4)
    reader = AttributeReader.load(HOME / "attribute-reader")
    accuracy = caption_accuracy(reader, images, [row["attributes"] for row in rows])
    assert accuracy["mean"] >= 0.9, accuracy  # as over all 512: training.json


@needs_weights
def test_training_record_reaches_the_figures() -> None:
    record = json.loads((SHIPPED / "training.json").read_text())
    assert record["evaluation"]["captions"] == 512
    assert record["evaluation"]["bfloat16"]["mean"] >= 0.9
    assert max(record["evaluation"]["kurtosis"].values()) > 10
