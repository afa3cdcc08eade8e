"""Every family with its weights in host memory: brought in for a call by real transfers."""

import copy
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from tiny_offload import NETWORKS, call, network
from torch import nn

from dirotq.kernels.linear import QuantLinear

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def group(kind: str, **more: Any) -> Callable[[nn.Module], None]:
    blocks = 1 if kind == "block_level" else None
    return lambda made: apply_group_offloading(
        made, GPU, CPU, kind, num_blocks_per_group=blocks, **more
    )


def sequential(made: nn.Module) -> None:
    accelerate.cpu_offload(made, GPU, offload_buffers=len(made._parameters) > 0)


KINDS = {
    "sequential": sequential,
    "model": lambda made: accelerate.cpu_offload_with_hook(made, GPU),
    "blocks": group("block_level"),
    "blocks, stream": group("block_level", use_stream=True),
    "leaves": group("leaf_level"),
    "leaves, stream": group("leaf_level", use_stream=True),
    "leaves, recorded": group("leaf_level", use_stream=True, record_stream=True),
    "leaves, pinned late": group("leaf_level", use_stream=True, low_cpu_mem_usage=True),
}


@pytest.fixture(scope="module", params=NETWORKS)
def made(request):
    plain = network(request.param)
    stays = copy.deepcopy(plain).to(GPU)
    return request.param, plain, stays


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_in_time_and_go(made, kind, full_float32):
    """float32 takes the reference everywhere. Results as without offloading; between calls every
    packed tensor is at home."""
    name, plain, stays = made
    twin = copy.deepcopy(plain)
    KINDS[kind](twin)
    want = call(stays, name, GPU)
    for _ in range(3):  # the second call of a stream has its prefetching traced, the third uses it
        got = call(twin, name, GPU)
        torch.cuda.synchronize()
        assert (got - want).norm() <= 0.02 * want.norm()
        if kind != "model":
            linears = [m for m in twin.modules() if isinstance(m, QuantLinear)]
            places = {tensor.device.type for m in linears for tensor in m.parameters()}
            assert places == {"meta" if kind == "sequential" else "cpu"}
