"""Which weights wait while the line draws, by a card that isn't here."""

import dataclasses

import pytest
import torch
from tiny_fixtures import *  # noqa: F403
from tiny_line import stage
from tiny_pipelines import family_folder

from dirotq.quantize.drawing import GPU_SLACK, WHOLE, choose, choose_here, drawn_on, with_site
from dirotq.quantize.running import Running, Way, of_calls
from dirotq.sources.model import DiffusersModel

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
GRAPHS, PLAIN, MODEL, GROUP = WHOLE
RUNNING = Running(
    weights={"text_encoder": 9 * 10**9, "transformer": 23 * 10**9, "vae": 10**8},
    layers={"text_encoder": 10**8, "transformer": 10**8, "vae": 10**7},
    denoising=2e9,
    decoding=3e9,
    tiled=1e9,
)


@pytest.fixture
def card(monkeypatch):
    """A GPU with as much free memory as a test says."""
    monkeypatch.setattr("dirotq.quantize.drawing.device_name", lambda _: "NVIDIA X")

    def free(size: float) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (size, size))

    return free


def test_the_fastest_way_of_whole_images_is_chosen():
    assert [way.offloading for way in WHOLE] == ["none", "none", "model", "group"]
    for way, slower in ((GRAPHS, PLAIN), (PLAIN, MODEL), (MODEL, GROUP)):
        least = GPU_SLACK * RUNNING.needs(way)
        assert choose(RUNNING, least) == way
        assert choose(RUNNING, least - 1) == slower
    assert choose(RUNNING, 0) == GROUP  # which preflight=false just tries


def test_images_of_a_batch_count_each(folder, line):
    model = stage(line(), "reference").model
    call = model.sample_arguments()
    one, four = (of_calls(folder, 100, call, batch=n) for n in (1, 4))
    assert four.weights == one.weights
    assert (four.denoising, four.decoding) == (4 * one.denoising, 4 * one.decoding)
    wide = of_calls(folder, 100, call, width=4)
    assert wide.weights == {name: 2 * size for name, size in one.weights.items()}
    assert (wide.denoising, wide.decoding) == (2 * one.denoising, 2 * one.decoding)


def test_the_way_here_is_of_the_memory_that_is_free(finished, line, card, caplog):
    model, packed = stage(line(), "reference").model, finished["pack"].tree("model")
    sites = [site for site in model.sites() if site.kind == "block"]
    wide = max(site.in_features + sum(site.out_features) for site in sites)
    for folder, weight in ((None, 0), (packed, 1000)):
        told = of_calls(folder or model.folder(), wide, model.sample_arguments(), batch=2)
        running = with_site(told, weight)
        assert running.denoising == told.denoising + 16 * weight
        for way in (GRAPHS, MODEL):
            caplog.clear()
            card(GPU_SLACK * running.needs(way))
            assert choose_here(model, 2, torch.bfloat16, CUDA, folder, weight) == way
            assert ("NVIDIA X can't hold all weights" in caplog.text) == (way == MODEL)


def test_a_cpu_and_several_denoisers_choose_nothing(tiny_root, line, card, monkeypatch):
    card(0)
    model = stage(line(), "reference").model
    assert choose_here(model, 1, torch.float32, CPU) == GRAPHS
    experts = DiffusersModel(path=str(family_folder(tiny_root, "wan22")), call={})
    assert choose_here(experts, 1, torch.bfloat16, CUDA) == GRAPHS
    folder = experts.folder()  # packed ones wait as others do
    assert choose_here(experts, 1, torch.bfloat16, CUDA, folder) == GROUP


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (GRAPHS, "CPU"),
        (MODEL, "CPU, components in host memory"),
        (GROUP, "CPU, layers in host memory"),
    ],
)
def test_the_report_names_what_waits(way, said):
    assert drawn_on(CPU, way) == said


def test_tiles_are_never_chosen():
    tight = dataclasses.replace(RUNNING, decoding=1e12)
    assert choose(tight, 30e9) == Way("group")
