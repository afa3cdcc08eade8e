"""`make bench-memory` on the CPU: every way draws its images, and leaves the pipeline as it was."""

import pytest
import torch
from narrow_models import NARROW, SMALL, narrowed

from dirotq.benchmarks import memory
from dirotq.quantize.running import PHASES

CALL = {"height": 64, "width": 64, "max_sequence_length": 16, "guidance_scale": 3.5}


@pytest.fixture
def pipe(monkeypatch):
    narrowed(monkeypatch)
    monkeypatch.setattr(memory, "VOCABULARY", {"text_encoder": 0, "text_encoder_2": 0})
    return memory.pipeline("w4", "cpu", SMALL, **NARROW["flux"])


def draw(pipe):
    noise = torch.Generator().manual_seed(0)
    return pipe("a star", num_inference_steps=2, output_type="pt", generator=noise, **CALL).images


@pytest.mark.parametrize("way", memory.SHOWN)
def test_every_way_measures_every_phase_and_goes_back(pipe, way, monkeypatch):
    peaks = iter(range(1, 1000))
    monkeypatch.setattr(memory, "_peak", lambda _: (next(peaks), 7))
    monkeypatch.setattr(memory, "_held", lambda _: 100)
    seen = []
    plain = pipe.vae.enable_tiling
    monkeypatch.setattr(pipe.vae, "enable_tiling", lambda: (seen.append("tiles"), plain()))
    monkeypatch.setattr(memory, "accelerate", lambda one, **given: seen.append(given) or one)
    want = draw(pipe)
    rows = list(memory.measured(pipe, way, "cpu", CALL))
    # load, then twice: encode, denoise, decode; of both images the larger, with idle graphs
    assert rows == [
        ("load", 1, 0, 7),
        ("encode", 5 + 100, 100, 7),
        ("denoise", 6 + 100, 100, 7),
        ("decode", 7 + 100, 100, 7),
    ]
    chosen = memory.SHOWN[way]
    assert ("tiles" in seen) == chosen.tiled
    assert seen[0] == {"compile": chosen.offloading == "none", "graphs": chosen.graphs}
    assert not pipe.vae.use_tiling
    assert torch.equal(draw(pipe), want)


def test_what_is_expected_knows_tiles(pipe):
    said = memory.expected(pipe)
    assert said.tiled is not None and said.weights.keys() >= {"transformer", "vae"}


def test_shapes_are_told_for_every_way():
    lines = list(memory.shapes("w4"))
    assert len(lines) == 2 + 2 * len(memory.SHOWN)
    assert all(line.count("|") == 3 + len(PHASES) for line in lines)
