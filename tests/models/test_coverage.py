"""How much of a network is packed: every family nearly all, and one architecture hardly any."""

import re

import diffusers
import pytest
import torch
from tiny_families import HEADS, ROPE, TINY

from dirotq.errors import ConfigError, UnsupportedError
from dirotq.models.coverage import refuse_few, share_kept, told
from dirotq.models.discovery import discover


def nucleus(experts: int) -> tuple:
    """A mixture of experts that multiplies by slices of one parameter; what is discovered of it."""
    model = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=5, joint_attention_dim=48, axes_dims_rope=ROPE,
        num_experts=experts, moe_intermediate_dim=128, capacity_factors=2.0, **HEADS,
    )  # fmt: skip
    kwargs = {
        "hidden_states": torch.randn(2, 9, 16),
        "img_shapes": [(1, 3, 3)] * 2,
        "encoder_hidden_states": torch.randn(2, 5, 48),
        "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.bool),
        "timestep": torch.tensor([0.3, 0.8]),
    }
    return model, discover(model, (), kwargs).sites


@pytest.mark.parametrize("name", TINY)
def test_families_leave_little(name):
    model = TINY[name].build()
    sites = TINY[name].family.sites(model)
    assert 0 <= share_kept(model, sites) < 0.2
    refuse_few(model, sites, 0.5)


def test_no_sites_leave_everything():
    model = TINY["flux"].build()
    assert share_kept(model, []) == 1
    with pytest.raises(UnsupportedError, match=r"100\.0 % of the block parameters stay in 16 bits"):
        refuse_few(model, [], 0.5)


def test_experts_that_are_slices_of_a_parameter():
    model, sites = nucleus(32)
    left = share_kept(model, sites)
    assert left > 0.5
    with pytest.raises(UnsupportedError) as caught:
        refuse_few(model, sites, 0.5)
    said = str(caught.value)
    assert told(model, sites) in said
    assert re.search(r"\(69\.\d % lie in expert tensors", said)
    assert "img_mlp.experts.gate_up_proj" in said
    allowed = float(said.rpartition("rank.least_packed=")[2].split()[0])
    refuse_few(model, sites, allowed)
    refuse_few(model, sites, 1 - left)
    with pytest.raises(UnsupportedError):
        refuse_few(model, sites, 1 - left + 1e-6)


def test_few_enough_experts_go_on():
    model, sites = nucleus(2)
    assert share_kept(model, sites) < 0.5
    refuse_few(model, sites, 0.5)


@pytest.mark.parametrize("least", [-0.1, 1.1, float("nan"), "half"])
def test_what_is_no_share(least):
    with pytest.raises(ConfigError, match=r"rank\.least_packed=.* is no share"):
        refuse_few(TINY["flux"].build(), [], least)
