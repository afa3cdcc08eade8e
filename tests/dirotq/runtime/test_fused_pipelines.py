"""Fused blocks inside diffusers' own pipelines: its loops, schedulers, callbacks and variants."""

import inspect
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
)
from tiny_fixtures import *  # noqa: F403

import dirotq
from dirotq.runtime import flux_fused

SIZE = 32


@pytest.fixture(scope="module")
def pipe(finished):
    return dirotq.load(finished["pack"].tree("model"), device="cpu")


def parts_of(pipe: Any, kind: type) -> Any:
    """Not ``from_pipe``, which would cast: diffusers refuses that for every quantized model."""
    names = inspect.signature(kind.__init__).parameters
    return kind(**{name: part for name, part in pipe.components.items() if name in names})


def inputs(kind: type, images: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    call: dict[str, Any] = {"prompt": ["a red star"] * images, "num_inference_steps": 2}
    call |= {"height": SIZE, "width": SIZE, "output_type": "pt"}
    if kind is not FluxPipeline:
        call |= {"image": torch.rand(images, 3, SIZE, SIZE, generator=draw), "strength": 0.9}
    if kind is FluxInpaintPipeline:
        mask = torch.zeros(images, 1, SIZE, SIZE)
        mask[..., : SIZE // 2] = 1
        call["mask_image"] = mask
    return call


@pytest.mark.parametrize("kind", [FluxPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline])
def test_variants_draw_what_the_unfused_network_draws(pipe, kind, monkeypatch):
    images = 2
    variant, joined, steps = parts_of(pipe, kind), flux_fused.joined, []
    passes: list[int] = []
    monkeypatch.setattr(flux_fused, "joined", lambda *x: passes.append(1) or joined(*x))

    def draw(fused: bool) -> torch.Tensor:
        dirotq.accelerate(variant, fused=fused)
        return variant(
            **inputs(kind, images),
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=lambda _, step, time, tensors: steps.append(step) or tensors,
        ).images

    got, fused_passes = draw(True), len(passes)
    want = draw(False)
    assert fused_passes and len(passes) == fused_passes  # it was fused, and then it was not
    assert len(steps) >= 2
    assert got.shape == (images, 3, SIZE, SIZE)
    assert (got - want).abs().mean() < 0.01  # a code may round the other way


def test_other_schedulers(pipe):
    other = parts_of(pipe, FluxPipeline)
    other.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    dirotq.accelerate(other, fused=True)
    made = other(**inputs(FluxPipeline, 1), generator=torch.Generator().manual_seed(0)).images
    assert made.isfinite().all()
