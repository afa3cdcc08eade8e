"""What loading takes of host memory, and what a GPU is told to hold."""

import re
import subprocess
import sys
from pathlib import Path

import diffusers
import loading_peak
import pytest
import torch
import transformers
from live_bytes import LiveBytes
from tiny_fixtures import *  # noqa: F403
from tiny_line import CALL, CAPTIONS, build_transformer, run_stage, stage
from tiny_offload import absent
from torch import nn

import dirotq
from dirotq.benchmarks.contestants import planned
from dirotq.errors import ConfigError
from dirotq.models.families import family_of
from dirotq.packed.swap import put_packed
from dirotq.packed.text_quantizer import TextEncoderConfig
from dirotq.quantize.running import CONTEXT, PHASES, Running, Way, of_folder
from dirotq.quantizer import DirotqConfig, mark_packed
from dirotq.runtime.accelerate import runtime_of
from dirotq.sources.opening import open_pipeline, place

SHARD = 4_000_000
NOISE = 6_000_000
"""Bytes that Python and torch take beside tensors."""


def packed_transformer(folder: Path) -> type:
    made = build_transformer(num_layers=3, num_attention_heads=16)
    specs = planned(family_of(type(made).__name__), made, "dirotq", 16)
    put_packed(made, specs.items())
    for module in made.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and tensor.is_meta:
                module._parameters[name] = nn.Parameter(
                    torch.ones_like(tensor, device="cpu"), requires_grad=False
                )
    mark_packed(made, DirotqConfig.of(specs.items()))
    made.save_pretrained(folder, max_shard_size=SHARD)
    return diffusers.FluxTransformer2DModel


def packed_encoder(folder: Path) -> type:
    config = transformers.T5Config(
        vocab_size=4000, d_model=512, d_ff=2048, num_layers=4, num_heads=8,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    cls = transformers.T5EncoderModel
    cls(config).bfloat16().save_pretrained(folder / "whole")
    packing = TextEncoderConfig(bits=8)
    made = cls.from_pretrained(folder / "whole", quantization_config=packing, dtype=torch.bfloat16)
    made.save_pretrained(folder, max_shard_size=SHARD)
    return cls


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells it")
def test_loading_takes_the_packed_size_and_a_shard(tmp_path):
    """In a process of its own: what other tests left, threads and caches, moves this one's
    memory."""
    words, sizes = [sys.executable, loading_peak.__file__], []
    for write in (packed_transformer, packed_encoder):
        folder = tmp_path / write.__name__
        cls = write(folder)
        files = list(folder.glob("*.safetensors"))
        sizes.append(sum(file.stat().st_size for file in files))
        assert len(files) > 3 and sizes[-1] > 3 * (SHARD + NOISE) / 2
        words += [f"{cls.__module__}.{cls.__name__}", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    for size, peak in zip(sizes, done.stdout.split(), strict=True):
        assert 0.5 * size < int(peak) <= size + SHARD + NOISE, (size, peak)


def of(**changes) -> Running:
    weights = {"text_encoder": 30, "text_encoder_2": 70, "transformer": 60, "vae": 5}
    layers = {"text_encoder": 2, "text_encoder_2": 8, "transformer": 6, "vae": 1}
    fields = {"denoising": 7.0, "decoding": 9.0} | changes
    gb = {"weights": weights, "layers": layers}
    scaled = {k: {n: int(v * 1e9) for n, v in part.items()} for k, part in gb.items()}
    return Running(**scaled, **{k: v * 1e9 for k, v in fields.items()})


RESIDENT, PLAIN = Way("none", graphs=True), Way("none")
MODEL, GROUP = Way("model"), Way("group")


def phases(running: Running, way: Way) -> list[float]:
    """In GB, without the context."""
    return [(v - CONTEXT) / 1e9 for v in running.phases(way).values()]


def test_phases_hold_what_they_compute_with():
    assert phases(of(), PLAIN) == pytest.approx([165, 165.5, 172, 174])
    assert phases(of(), MODEL) == pytest.approx([0, 70.5, 67, 14])
    assert phases(of(), GROUP) == pytest.approx([0, 24.5, 25, 12])
    assert phases(of(tiled=1.0), Way("group", tiled=True)) == pytest.approx([0, 24.5, 25, 4])


def test_graphs_stay_while_other_parts_compute():
    assert phases(of(), RESIDENT) == pytest.approx([165, 172.5, 172, 181])
    two = of()
    two = Running(
        weights={**two.weights, "transformer_2": 50 * 10**9}, layers=two.layers,
        denoising=two.denoising, decoding=two.decoding,
    )  # fmt: skip
    assert phases(two, RESIDENT) == pytest.approx([215, 229.5, 229, 238])
    assert phases(two, MODEL) == pytest.approx([0, 70.5, 67, 14])


@pytest.mark.parametrize(
    "vram, chosen",
    [(181.6, RESIDENT), (181.5, PLAIN), (174.6, PLAIN), (174.5, MODEL), (71.1, MODEL),
     (71.0, GROUP), (25.6, GROUP)],
)  # fmt: skip
def test_the_fastest_way_that_fits_is_chosen(vram, chosen):
    assert of().choose(int(vram * 1e9)) == chosen


@pytest.mark.parametrize(
    "vram, chosen",
    [
        (174.6, PLAIN),  # tiles change images, the lack of graphs does not
        (174.5, Way("none", tiled=True, graphs=True)),
        (172.6, Way("none", tiled=True)),
        (172.5, MODEL),  # to denoise, all of it
        (25.6, GROUP),
    ],
)
def test_tiles_come_before_offloading_and_only_where_they_help(vram, chosen):
    assert of(tiled=1.0).choose(int(vram * 1e9)) == chosen
    large = of(decoding=200.0, tiled=1.0)
    assert large.choose(int(71.1e9)) == Way("model", tiled=True)
    assert of(tiled=9.5).choose(int(174.5e9)) == MODEL


def test_tiles_are_told_where_they_lower_the_peak():
    def lines(running: Running) -> list[str]:
        return [line.partition(":")[0].partition("GPU, ")[2] for line in running.told()]

    both = ["all resident", "with model offload"]
    assert lines(of()) == lines(of(tiled=9.5)) == both
    assert lines(of(tiled=1.0)) == ["all resident", "all resident, decoded in tiles", both[1]]
    assert "~172.6 GB to denoise, ~173.6 GB to decode" in of(tiled=1.0).told()[1]
    names = list(of(decoding=200.0, tiled=1.0).reported())
    assert names == ["none", "none, tiled", "model", "model, tiled", "group", "group, tiled"]


def test_what_can_not_be_met_says_the_least():
    with pytest.raises(
        ConfigError, match=r"vram=25.5GB can't be met.*25.6 GB.*to denoise, where layers are"
    ) as error:
        of().choose(25_500_000_000)
    least = re.search(r"Give vram=([\d.]+)GB", str(error.value))[1]
    assert of().choose(int(float(least) * 1e9)) == GROUP


def test_a_folder_is_read_by_its_headers(finished):
    folder = finished["pack"].tree("model")
    told = of_folder(folder)
    assert told.weights.keys() == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    for name, size in told.weights.items():
        files = sum(f.stat().st_size for f in (folder / name).glob("*.safetensors"))
        assert 0.9 * files < size <= files
        assert 0 < told.layers[name] < size
    assert told.denoising > 0 and told.decoding > 0
    assert told.tiled is not None and told.tiled >= told.decoding  # 32 pixels are one tile
    larger = Running(
        weights=told.weights, layers=told.layers, denoising=1e12, decoding=told.decoding
    )
    assert max(PHASES, key=larger.phases(PLAIN).__getitem__) == "denoise"


class Card:
    total_memory = 24_000_000_000


@pytest.fixture
def card(monkeypatch):
    """A GPU of 24 GB as far as anybody asks, on which nothing arrives."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # nothing is set for the tests to come
    monkeypatch.setattr("dirotq.loading.pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA X")
    placed = []
    monkeypatch.setattr("dirotq.sources.opening.place", lambda pipe, _, kind: placed.append(kind))
    return placed


def test_loading_within_memory_says_what_it_chose(finished, card, caplog):
    folder = finished["pack"].path
    running = of_folder(finished["pack"].tree("model"))
    for vram in ("20GB", int(running.needs(PLAIN)) + 1, int(running.needs(MODEL)) + 1):
        caplog.clear()
        pipe = dirotq.load(folder, vram=vram, dtype=torch.float32)
        graphed = runtime_of(pipe.transformer).graphs
        way = card[-1]
        assert ("no CUDA graphs are recorded" in caplog.text) == (way == "none" and not graphed)
        assert graphed == (vram == "20GB" or way == "model")  # offloaded, none is recorded anyway
    assert card == ["none", "none", "model"]
    assert "components take turns" in caplog.text


def test_loading_within_memory_asks_torch_to_hold_little(finished, card, caplog, monkeypatch):
    monkeypatch.setattr("dirotq.loading.expandable_segments", lambda: True)
    dirotq.load(finished["pack"].path, vram="20GB", dtype=torch.float32)
    assert "expandable_segments" not in caplog.text
    monkeypatch.setattr("dirotq.loading.expandable_segments", lambda: False)
    dirotq.load(finished["pack"].path, vram="20GB", dtype=torch.float32)
    assert "CUDA was used before" in caplog.text


@pytest.mark.parametrize(
    "vram, says",
    [("1MB", "can't be met.*at least"), ("25GB", "more than NVIDIA X"), ("x", "no size")],
)
def test_memory_that_can_not_be_had(finished, card, vram, says):
    with pytest.raises(ConfigError, match=says):
        dirotq.load(finished["pack"].path, vram=vram)
    assert not card


def test_memory_of_a_gpu_without_one(finished):
    with pytest.raises(ConfigError, match="about a GPU's memory"):
        dirotq.load(finished["pack"].path, vram="8GB", device="cpu")


@pytest.mark.parametrize("kind", ["model", "group"])
def test_every_way_draws_the_same_image_with_packed_text_encoders(
    kind, line, finished, folder, tmp_path, monkeypatch
):
    built = stage(line("text_encoders=w4"), "pack")
    run_stage(built, tmp_path, **{name: finished[name] for name in ("rank", "gptq", "fuse")})
    pipe = open_pipeline(tmp_path / "model", torch.float32, torch.device("cpu"))

    def draw() -> torch.Tensor:
        noise = torch.Generator().manual_seed(0)
        return pipe(CAPTIONS[0], generator=noise, output_type="pt", **CALL).images

    want = draw()
    if kind == "group":
        absent(monkeypatch)
    place(pipe, torch.device("cpu"), kind)
    assert torch.equal(draw(), want)


def test_placing_takes_no_more_than_what_then_lies_there(finished):
    pipe = open_pipeline(finished["pack"].tree("model"), torch.bfloat16, torch.device("cpu"))
    with LiveBytes() as live:
        place(pipe, torch.device("meta"), "none")
    said = sum(of_folder(finished["pack"].tree("model")).weights.values())
    assert live.peak == live.now == pytest.approx(said, rel=0.02)
