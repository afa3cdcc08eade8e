"""``dequantize()`` of a packed transformer: a plain diffusers model with what was rounded."""

import copy
import functools

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FluxTransformer2DModel
from tiny_offload import NETWORKS, call, inputs, network, original

import dirotq
from dirotq.errors import UnsupportedError
from dirotq.kernels.linear import PointwiseView, QuantLinear, SiteView
from dirotq.models.discovery import discover
from dirotq.models.families import known_family
from dirotq.packed.dequantize import dequantize_sites

PACKED = QuantLinear | SiteView | PointwiseView


@pytest.fixture
def pipe(finished):
    return dirotq.load(finished["pack"].path, device="cpu")


def test_it_is_diffusers_own_model_then(pipe, folder, tmp_path):
    packed = pipe.transformer
    given = _inputs(packed)
    want = packed(**given)[0]
    made = packed.dequantize()
    assert made is packed
    assert not any(isinstance(module, PACKED) for module in made.modules())
    assert not any(isinstance(value, functools.partial) for value in vars(made).values())
    got = made(**given)[0]
    assert (got - want).norm() < 0.3 * want.norm()  # activations are not rounded any more
    made.to(torch.bfloat16).save_pretrained(tmp_path)
    again = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert "quantization_config" not in again.config
    plain = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    assert list(again.state_dict()) == list(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        assert (again.state_dict()[name] - tensor).norm() <= 0.25 * tensor.norm(), name


@pytest.mark.parametrize("name", NETWORKS)
def test_every_family(name):
    """The same linears as before, also 1x1 convolutions."""
    made, plain = network(name), original(name)
    family = known_family(type(plain).__name__)
    sites = family.sites(plain) if family else discover(plain, (), inputs(name)).sites
    dequantize_sites(made, sites)
    assert {n: t.shape for n, t in made.state_dict().items()} == {
        n: t.shape for n, t in plain.state_dict().items()
    }
    assert {n: type(m) for n, m in made.named_modules()} == {
        n: type(m) for n, m in plain.named_modules()
    }
    assert call(made, name).isfinite().all()


def test_what_is_elsewhere_is_not_dequantized(pipe):
    cpu_offload(pipe.transformer, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=r"is offloaded.*remove_all_hooks"):
        pipe.transformer.dequantize()
    assert pipe.transformer.is_quantized
    pipe.remove_all_hooks()
    twin = copy.deepcopy(pipe.transformer)
    assert not any(isinstance(module, PACKED) for module in twin.dequantize().modules())
    assert any(isinstance(module, PACKED) for module in pipe.transformer.modules())


def _inputs(transformer):
    config = transformer.config
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, config.in_channels, generator=draw),
        "encoder_hidden_states": torch.randn(1, 8, config.joint_attention_dim, generator=draw),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=draw),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
        "return_dict": False,
    }
