"""tiny-pixart is trained as PixArtSigmaPipeline runs it, and the shipped one draws."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from safetensors.torch import load_file
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

import dirotq.assets
from dirotq.assets import evaluate
from dirotq.assets.captions import T5_LENGTH
from dirotq.assets.color_roles import NO_ROLE
from dirotq.assets.denoisers import PixArtDenoiser
from dirotq.assets.make_prompts import PROMPTS
from dirotq.assets.tiny_pixart import GENERATION, TIMESTEPS, build_transformer, save_pipeline
from dirotq.assets.train_tiny_pixart import choose_guidance, load_autoencoder
from dirotq.assets.training_pool import Pool
from dirotq.evaluate.attribute_reader import AttributeReader, caption_accuracy
from dirotq.sources.model import DiffusersModel

HOME = Path(dirotq.assets.__file__).parent
FLUX, SHIPPED = HOME / "tiny-flux", HOME / "tiny-pixart"
CAPTIONS = ["a large red star at the top, on blue", "a tiny cyan ring on the left, on green"]
needs_weights = pytest.mark.skipif(
    not (SHIPPED / "model_index.json").exists(), reason="assets/tiny-pixart is not there"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-pixart on disk, its transformer untrained."""
    folder = tmp_path_factory.mktemp("untrained")
    save_pipeline(
        folder,
        tokenizer=T5Tokenizer.from_pretrained(FLUX / "tokenizer_2"),
        autoencoder=load_autoencoder(),
        t5=T5EncoderModel.from_pretrained(FLUX / "text_encoder_2"),
        transformer=build_transformer(),
        guidance=2.0,
    )
    return folder


@pytest.fixture
def pipeline(folder: Path) -> PixArtSigmaPipeline:
    return evaluate.load_pipeline(folder, torch.device("cpu"), torch.float32)


class StraightFlow:
    """A denoiser that knows where every sample comes from and where it has to go."""

    def __init__(self, clean: Tensor, noise: Tensor) -> None:
        self.clean, self.noise = clean, noise
        self.seen: list[tuple[float, Tensor]] = []

    def __call__(self, sample: Tensor, timestep: Tensor, **_: object) -> tuple[Tensor]:
        half = len(sample) // 2
        self.seen.append((timestep[0].item(), sample[half:]))
        velocity = self.noise - self.clean
        return (torch.cat([torch.zeros_like(velocity), velocity / 2]),)  # guidance 2 doubles it


def test_sampler_and_training_mean_the_same_by_time_and_velocity(
    pipeline: PixArtSigmaPipeline,
) -> None:
    clean, noise = torch.randn(2, 2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    flow = StraightFlow(clean, noise)
    pipeline.transformer.forward = flow
    call = GENERATION | {"guidance_scale": 2.0}
    made = pipeline(CAPTIONS, latents=noise, output_type="latent", **call).images
    torch.testing.assert_close(made, clean, atol=0.01, rtol=0)
    assert len(flow.seen) == GENERATION["num_inference_steps"]
    for timestep, sample in flow.seen:
        mixed = torch.lerp(clean, noise, timestep / TIMESTEPS)
        torch.testing.assert_close(sample, mixed, atol=0.02, rtol=0)


@torch.no_grad()
def test_training_encodes_captions_as_the_pipeline_does(pipeline: PixArtSigmaPipeline) -> None:
    tokenizer = pipeline.tokenizer
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=T5_LENGTH).input_ids
    pool = Pool(
        latents=torch.zeros(2, 4, 32, 32),
        clip_ids=torch.zeros(2, 64, dtype=torch.int32),
        t5_ids=torch.tensor(ids, dtype=torch.int32),
        roles=torch.ones(2, T5_LENGTH, dtype=torch.int8),
        ordered=torch.zeros(0, dtype=torch.int64),
    )
    positive, positive_mask, negative, negative_mask = pipeline.encode_prompt(
        CAPTIONS, max_sequence_length=T5_LENGTH
    )
    for dropout, text, mask in ((0.0, positive, positive_mask), (1.0, negative, negative_mask)):
        denoiser = PixArtDenoiser(
            transformer=pipeline.transformer, t5=pipeline.text_encoder, dropout=dropout
        )
        conditions, roles = denoiser.encode(pool, torch.arange(2))
        torch.testing.assert_close(conditions, (text, mask))
        assert (roles == (NO_ROLE if dropout else 1)).all()


def test_guidance_is_the_strongest_that_costs_nothing() -> None:
    means = {"1.5": 0.98, "2": 0.99, "3": 0.989, "4.5": 0.95}
    assert choose_guidance({name: {"mean": mean} for name, mean in means.items()}) == 3.0


@needs_weights
def test_shipped_weights_are_finite_and_small_enough_to_review() -> None:
    files = list(SHIPPED.rglob("*.safetensors"))
    assert files
    for file in files:
        assert file.stat().st_size <= 9 * 10**6
        for name, tensor in load_file(file).items():
            assert tensor.dtype == torch.bfloat16
            assert tensor.isfinite().all(), name
            assert tensor.count_nonzero() > 0, name


@needs_weights
def test_shipped_model_draws_what_captions_say() -> None:
    rows = [json.loads(line) for line in (PROMPTS / "tiny_heldout.jsonl").open()][:4]
    settings = json.loads((SHIPPED / "generation.json").read_text())
    assert settings["guidance_scale"] > 1  # so that calibration and figures see guided calls
    pipeline = evaluate.load_pipeline(SHIPPED, torch.device("cpu"), torch.float32)
    images = evaluate.generate(pipeline, rows, settings, batch=4)
    reader = AttributeReader.load(HOME / "attribute-reader")
    accuracy = caption_accuracy(reader, images, [row["attributes"] for row in rows])
    assert accuracy["mean"] >= 0.85, accuracy  # more over all 512: training.json


@needs_weights
def test_training_record_reaches_the_figures() -> None:
    record = json.loads((SHIPPED / "training.json").read_text())
    assert record["evaluation"]["captions"] == 512
    assert record["evaluation"]["bfloat16"]["mean"] >= 0.95


@needs_weights
def test_the_line_finds_its_sites() -> None:
    model = DiffusersModel(path="assets://tiny-pixart", call={})
    sites = model.sites()
    # one modulation; of each block q/k/v, out, q, k/v of the text, out, up and down
    assert len(sites) == 1 + 3 * 7
    assert model.call_arguments() == json.loads((SHIPPED / "generation.json").read_text())
