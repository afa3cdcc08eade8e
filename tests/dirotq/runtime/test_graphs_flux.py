"""A FLUX transformer behind graphs."""

import copy
import inspect
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from tiny_line import POOLED, TEXT, build_transformer
from tiny_packed import packed
from tiny_spec import tiny_spec
from toy_graphs import (
    Again,
    fresh,  # noqa: F401
    recorded,
    run,
    why_eager,
)

from dirotq.models.flux import FLUX
from dirotq.packed.swap import swap_sites
from dirotq.runtime.graphs import graph_forward


def flux() -> Any:
    """A tiny FLUX whose sites are packed and shared."""
    network = build_transformer(num_layers=1, num_single_layers=1)
    build = lambda site: packed(tiny_spec(dim=site.in_features, rows=site.out_features))  # noqa: E731
    swap_sites(network, FLUX.sites(network), build)
    return network


def arguments(seed: int = 0, tokens: int = 9) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, tokens, 16, generator=draw),
        "encoder_hidden_states": torch.randn(2, 5, TEXT, generator=draw),
        "pooled_projections": torch.randn(2, POOLED, generator=draw),
        "timestep": torch.rand(2, generator=draw),
        "img_ids": torch.randint(0, 3, (tokens, 3), generator=draw),
        "txt_ids": torch.zeros(5, 3),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }


@pytest.fixture(scope="module")
def plain():
    return flux()


def test_flux_replays_what_it_computes(plain):
    network = flux()
    graph_forward(network, recorder=Again)
    for seed in range(3):
        for tokens in (9, 12):
            call = arguments(seed, tokens)
            assert torch.equal(run(network, **call)[0], run(plain, **call)[0])
    assert (Again.captures, Again.replays) == (2, 4)


def test_flux_processors_and_backends(monkeypatch):
    # A network's backend is everyone's: put back what was.
    active = _AttentionBackendRegistry._active_backend
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", active)
    network = flux()
    graph_forward(network, recorder=Again)
    recorded(network, **arguments())
    network.set_attn_processor(FluxAttnProcessor())
    recorded(network, **arguments())
    assert Again.captures == 2
    network.set_attention_backend("_native_math")
    recorded(network, **arguments())
    assert Again.captures == 3


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_flux_group_offloading(caplog, plain, kind):
    network = flux()
    graph_forward(network, recorder=Again)
    recorded(network, **arguments())
    apply_group_offloading(network, torch.device("cpu"), offload_type=kind, num_blocks_per_group=1)
    assert "diffusers' hooks" in why_eager(caplog, network, **arguments())
    assert torch.equal(run(network, **arguments())[0], run(plain, **arguments())[0])


def test_flux_offloaded_before(caplog):
    network = flux()
    apply_group_offloading(network, torch.device("cpu"), offload_type="leaf_level")
    graph_forward(network, recorder=Again)
    assert "diffusers' hooks" in why_eager(caplog, network, **arguments())


def test_flux_layerwise_casting(caplog):
    network = build_transformer()
    graph_forward(network, recorder=Again)
    apply_layerwise_casting(network, torch.bfloat16, torch.float32)
    assert "diffusers' hooks" in why_eager(caplog, network, **arguments())


def test_flux_saves_and_loads_as_before(plain, tmp_path):
    network = build_transformer()
    names = list(network.state_dict())
    graph_forward(network, recorder=Again)
    recorded(network, **arguments())
    assert list(network.state_dict()) == names
    network.save_pretrained(tmp_path)
    again = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert "forward" not in vars(again)
    assert torch.equal(run(again, **arguments())[0], run(network, **arguments())[0])


def test_flux_deep_copy_moves(plain):
    network = flux()
    graph_forward(network, recorder=Again)
    twin = copy.deepcopy(network).to(torch.bfloat16).to(torch.float32)
    recorded(twin, **arguments())
    assert twin.forward.transformer is twin
    assert Again.captures == 1
    assert "joint_attention_kwargs" in inspect.signature(twin.forward).parameters


def test_flux_compiles_whole(plain):
    torch.compiler.reset()
    network = flux()
    graph_forward(network, recorder=Again)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    got, want = run(compiled, **arguments())[0], run(plain, **arguments())[0]
    assert (got - want).norm() < 0.02 * want.norm()  # a code may round the other way
    assert Again.captures == 0
