"""A packed FLUX transformer of two blocks for GPU tests, and a call of it."""

from typing import Any

import torch
from formats import spec_of
from tiny_line import POOLED, TEXT, build_transformer
from tiny_packed import packed
from torch import Tensor

from dirotq.models.flux import FLUX
from dirotq.packed.swap import swap_sites


def build(device: str = "cuda") -> Any:
    """Two blocks of width 512, packed and shared, in bfloat16."""
    network = build_transformer(num_layers=1, num_single_layers=1, num_attention_heads=16)
    site_module = lambda site: packed(spec_of("rms", site.in_features, sum(site.out_features)))  # noqa: E731
    swap_sites(network, FLUX.sites(network), site_module)
    return network.to(device, torch.bfloat16)


def arguments(seed: int = 0, tokens: int = 64, batch: int = 2, device: str = "cuda") -> Any:
    draw = torch.Generator().manual_seed(seed)
    call = {
        "hidden_states": torch.randn(batch, tokens, 16, generator=draw).bfloat16(),
        "encoder_hidden_states": torch.randn(batch, 32, TEXT, generator=draw).bfloat16(),
        "pooled_projections": torch.randn(batch, POOLED, generator=draw).bfloat16(),
        "timestep": torch.rand(batch, generator=draw).bfloat16(),
        "img_ids": torch.randint(0, 16, (tokens, 3), generator=draw).bfloat16(),
        "txt_ids": torch.zeros(32, 3).bfloat16(),
    }
    return {name: tensor.to(device) for name, tensor in call.items()} | {"return_dict": False}


def run(network: Any, **call: Any) -> Tensor:
    with torch.no_grad():
        return network(**call)[0]
