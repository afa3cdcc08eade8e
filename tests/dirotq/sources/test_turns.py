"""Several denoisers within the memory of one."""

import logging
import weakref

import pytest
import torch
from live_bytes import LiveBytes
from tiny_fixtures import *  # noqa: F403
from tiny_pipelines import PIPELINES, family_folder
from torch import nn

from dirotq.calibrate.trajectory import Trajectories
from dirotq.errors import UnsupportedError
from dirotq.models.denoisers import denoisers_of
from dirotq.sources.generation import generate
from dirotq.sources.model import DiffusersModel
from dirotq.sources.opening import open_pipeline
from dirotq.sources.prompts import Prompt
from dirotq.sources.turns import Turns, share_memory

CPU = torch.device("cpu")
PROMPTS = [Prompt(text="a star", seed=1)]
CALL = PIPELINES["wan22"].call


@pytest.fixture(scope="module")
def model(tiny_root):
    return DiffusersModel(path=str(family_folder(tiny_root, "wan22")), call={})


@pytest.fixture(scope="module")
def want(model):
    return generate(open_pipeline(model.folder(), torch.float32, CPU), PROMPTS, CALL)


@pytest.fixture
def full(monkeypatch):
    """No room for two denoisers."""
    monkeypatch.setattr("dirotq.sources.turns.free_ram", lambda: 1)


def peak(make):
    """Return what was made, and the bytes of all tensors that were alive at the peak."""
    with LiveBytes("cpu") as live:
        made = make()
    return made, live.peak


def test_two_take_the_memory_of_one(model, want, caplog, monkeypatch):
    def made():
        return generate(model.pipeline(torch.float32, CPU), PROMPTS, CALL)

    (both, of_both), said = peak(made), caplog.text
    assert "take turns" not in said
    monkeypatch.setattr("dirotq.sources.turns.free_ram", lambda: 1)
    with caplog.at_level(logging.INFO):
        one, of_one = peak(made)
    assert "transformer and transformer_2 take turns on cpu" in caplog.text
    assert torch.equal(both, want) and torch.equal(one, want)
    expert = 4 * sum(p.numel() for p in model.skeleton()["transformer"].parameters())
    assert of_both - of_one == expert


def test_calls_are_recorded_in_turn(model, full):
    def recorded():
        source = Trajectories(model, torch.float32, CPU, None)
        source.encode([PROMPTS])
        assert all(
            p.is_meta for one in denoisers_of(source.pipe).values() for p in one.parameters()
        )
        source.load_transformer()
        return source.record(PROMPTS, range), source

    calls, source = recorded()
    parts = denoisers_of(source.pipe)
    assert parts["transformer"].patch_embedding.weight.is_meta  # what ran last is there
    assert not parts["transformer_2"].patch_embedding.weight.is_meta
    assert {call.part for call in calls} == set(parts)


def test_denoisers_that_are_streamed_share_memory(model, want):
    pipe = model.hollow(torch.float32, CPU)
    parts, kept = denoisers_of(pipe), []

    def keep(tensor):
        kept.append(tensor.clone())
        return kept[-1]

    share_memory(parts, model.weights_apart(), torch.float32, Turns(CPU), keep)
    one, other = (list(denoiser.parameters()) for denoiser in parts.values())
    places = [[tensor.data_ptr() for tensor in module] for module in (one, other)]
    assert places[0] == places[1] and len(kept) == len(parts["transformer"].state_dict())
    assert torch.equal(generate(pipe, PROMPTS, CALL), want)
    assert torch.equal(generate(pipe, PROMPTS, CALL), want)


def test_denoisers_of_other_shapes_share_none(model):
    parts = denoisers_of(model.hollow(torch.float32, CPU))
    parts["transformer_2"].proj_out = nn.Linear(8, 8)
    with pytest.raises(UnsupportedError, match=r"capture\.vram"):
        share_memory(parts, model.weights_apart(), torch.float32, Turns(CPU), torch.clone)


def test_components_come_and_go(monkeypatch):
    moved, turns = [], Turns(torch.device("meta"))
    one, other = nn.Linear(2, 2, device="meta"), nn.Linear(2, 2, device="meta")
    for name, module in (("one", one), ("other", other)):
        to = lambda device, name=name: moved.append((name, str(device)))  # noqa: E731
        monkeypatch.setattr(module, "to", to, raising=False)
    turns.add_component(one)
    turns.add(other, lambda module: module.to("here"), lambda module: module.to("gone"))
    x = torch.empty(1, 2, device="meta")
    for module in (one, one, other, other, one):
        module(x)
    assert moved == [
        ("one", "meta"), ("one", "cpu"), ("other", "here"), ("other", "gone"), ("one", "meta")
    ]  # fmt: skip


def test_hooks_hold_no_module():
    turns, module = Turns(CPU), nn.Linear(2, 2)
    turns.add(module, lambda _: None, lambda _: None)
    module(torch.ones(1, 2))
    gone = weakref.ref(module.weight)
    del module
    assert gone() is None
