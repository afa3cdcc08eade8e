"""diffusers' own switches on whole pipelines, the CPU in the accelerator's place."""

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from tiny_fixtures import *  # noqa: F403
from tiny_offload import absent

import dirotq
from dirotq.kernels.linear import QuantLinear


@pytest.fixture
def pipe(finished):
    return dirotq.load(finished["pack"].tree("model"), device="cpu")


def draw(pipe: Any) -> torch.Tensor:
    return pipe(
        prompt="a red star", num_inference_steps=2, height=32, width=32, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


def packed(pipe: Any) -> list[torch.Tensor]:
    linears = [m for m in pipe.transformer.modules() if isinstance(m, QuantLinear)]
    return [tensor for linear in linears for tensor in linear.parameters()]


def test_offloading_draws_the_same_image(pipe):
    want, network = draw(pipe), pipe.transformer
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(pipe), want)
    pipe.remove_all_hooks()
    # What `enable_sequential_cpu_offload` does; it writes "cpu:0", which accelerate takes for
    # another device than "cpu".
    cpu_offload(network, torch.device("cpu"), offload_buffers=len(network._parameters) > 0)
    for _ in range(2):
        assert all(tensor.is_meta for tensor in packed(pipe))
        assert torch.equal(draw(pipe), want)
    pipe.remove_all_hooks()
    assert not any(tensor.is_meta for tensor in packed(pipe))
    assert torch.equal(draw(pipe), want)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading_to_the_disk_draws_the_same_image(pipe, kind, tmp_path, monkeypatch):
    absent(monkeypatch)
    for tensor in pipe.transformer.parameters():
        tensor.data = tensor.data.clone()
    want = draw(pipe)
    pipe.enable_group_offload(
        torch.device("cpu"),
        offload_type=kind,
        num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path),
        exclude_modules=[n for n in pipe.components if n != "transformer"],
    )
    assert torch.equal(draw(pipe), want)
