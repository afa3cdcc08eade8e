"""Every family and every way of offloading: what comes out is what came out without hooks."""

import copy

import pytest
import torch
from tiny_offload import KINDS, NETWORKS, absent, call, network, remove
from torch import nn

from dirotq.kernels.linear import PointwiseView, QuantLinear, SiteView


@pytest.fixture(scope="module", params=NETWORKS)
def made(request):
    """A network, its state, and what it computes."""
    plain = network(request.param)
    return request.param, plain, call(plain, request.param)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_those_without_hooks(made, kind, monkeypatch, tmp_path):
    name, plain, want = made
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
@pytest.mark.parametrize("kind", ["cpu_offload", "sequential", "disk_offload", "dispatch, disk"])
def test_no_packed_tensor_stays_behind(made, kind, tmp_path):
    name, plain, _ = made
    twin = copy.deepcopy(plain)
    KINDS[kind](twin, tmp_path)
    for _ in range(2):
        held = [t for m in twin.modules() if isinstance(m, QuantLinear) for t in m.parameters()]
        assert held and all(tensor.is_meta for tensor in held)
        call(twin, name)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["sequential", "model", "dispatch, parts"])
def test_a_deep_copy_brings_its_own_weights(made, kind, tmp_path):
    name, plain, want = made
    hooked = copy.deepcopy(plain)
    KINDS[kind](hooked, tmp_path)
    twin = copy.deepcopy(hooked)
    assert torch.equal(call(twin, name), want)
    remove(twin, kind)
    assert torch.equal(call(twin, name), want)
    assert torch.equal(call(hooked, name), want)


def test_views_have_no_tensors_to_bring(made):
    plain = made[1]
    views = [m for m in plain.modules() if isinstance(m, SiteView | PointwiseView)]
    assert views
    assert not any(list(view.state_dict()) for view in views)


def test_the_dtype_of_a_packed_network_is_what_it_computes_in(made):
    plain = made[1]
    for dtype in (torch.float32, torch.float16):
        assert nn.Module.to(copy.deepcopy(plain), dtype).dtype == dtype
