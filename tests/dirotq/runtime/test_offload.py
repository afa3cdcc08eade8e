"""Offloaded, a network computes what it computes without hooks: FLUX in every way, of every other
network one way of each library and depth (hooks of modules, of leaves, of groups; to RAM and disk).
"""

import copy

import pytest
import torch
from tiny_offload import KINDS, NETWORKS, absent, call, remove
from torch import nn

from dirotq.kernels.linear import PointwiseView, QuantLinear, SiteView


def cases(flux: list[str], others: list[str]) -> pytest.MarkDecorator:
    """FLUX in the ways ``flux``, every other network in the ways ``others``."""
    found = [(name, kind) for name in NETWORKS for kind in (flux if name == "flux" else others)]
    return pytest.mark.parametrize(("name", "kind"), found)


@pytest.mark.filterwarnings("ignore::UserWarning")
@cases(list(KINDS), ["sequential", "dispatch, parts", "blocks", "leaves, disk"])
def test_results_are_those_without_hooks(plain_network, name, kind, monkeypatch, tmp_path):
    plain, want = plain_network(name)
    assert want.isfinite().all() and want.std() > 0
    absent(monkeypatch)
    twin = copy.deepcopy(plain)
    KINDS[kind](twin, tmp_path)
    for _ in range(2):
        assert torch.equal(call(twin, name), want)
    remove(twin, kind)
    state = twin.state_dict()
    assert list(state) == list(plain.state_dict())
    for tensor, before in plain.state_dict().items():
        assert torch.equal(state[tensor], before), tensor
        assert state[tensor].dtype == before.dtype
    assert torch.equal(call(twin, name), want)


@pytest.mark.filterwarnings("ignore::UserWarning")
@cases(["cpu_offload", "sequential", "disk_offload", "dispatch, disk"], ["sequential"])
def test_no_packed_tensor_stays_behind(plain_network, name, kind, tmp_path):
    plain, _ = plain_network(name)
    twin = copy.deepcopy(plain)
    KINDS[kind](twin, tmp_path)
    for _ in range(2):
        held = [t for m in twin.modules() if isinstance(m, QuantLinear) for t in m.parameters()]
        assert held and all(tensor.is_meta for tensor in held)
        call(twin, name)


@pytest.mark.filterwarnings("ignore::UserWarning")
@cases(["sequential", "model", "dispatch, parts"], ["dispatch, parts"])
def test_a_deep_copy_brings_its_own_weights(plain_network, name, kind, tmp_path):
    plain, want = plain_network(name)
    hooked = copy.deepcopy(plain)
    KINDS[kind](hooked, tmp_path)
    twin = copy.deepcopy(hooked)
    assert torch.equal(call(twin, name), want)
    remove(twin, kind)
    assert torch.equal(call(twin, name), want)
    assert torch.equal(call(hooked, name), want)


@pytest.mark.parametrize("name", NETWORKS)
def test_views_have_no_tensors_to_bring(plain_network, name):
    plain, _ = plain_network(name)
    views = [m for m in plain.modules() if isinstance(m, SiteView | PointwiseView)]
    assert views
    assert not any(list(view.state_dict()) for view in views)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_dtype_of_a_packed_network_is_what_it_computes_in(plain_network, name):
    plain, _ = plain_network(name)
    for dtype in (torch.float32, torch.float16):
        assert nn.Module.to(copy.deepcopy(plain), dtype).dtype == dtype
