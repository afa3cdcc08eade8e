"""A network without weights: its memory, and what is computed of it and what is made up."""

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import flex_attention as flex

from dirotq.models import hollow
from dirotq.models.discovery import discover
from dirotq.models.hollow import Cheaply

N = 320
PRODUCTS = {
    "mm": lambda x: x[0, 0] @ x[0, 0].mT,
    "linear": lambda x: F.linear(x, x[0, 0], x[0, 0, :, 0]),
    "matmul": lambda x: x @ x.mT,
    "conv": lambda x: F.conv2d(x, x[:, :, :1, :1].expand(2, 2, 3, 3), padding=1),
    "sdpa": lambda x: F.scaled_dot_product_attention(x, x, x),
    "flex": lambda x: flex.flex_attention(x, x, x),
}


@pytest.fixture
def cheap(monkeypatch):
    """Everything large enough from the first element on."""
    monkeypatch.setattr(hollow, "COSTLY", 0)
    monkeypatch.setattr(hollow, "LARGE", 1 << 10)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_made_up_product_has_the_shape_and_layout_of_the_real_one(name, dtype, cheap):
    x = torch.randn(2, 2, N, N, dtype=dtype)
    with torch.no_grad(), Cheaply():
        got = PRODUCTS[name](x)
    if name == "flex":
        assert (got.shape, got.dtype, got.device) == (x.shape, dtype, x.device)
        return
    want = PRODUCTS[name](x)
    assert (got.shape, got.dtype, got.stride()) == (want.shape, dtype, want.stride())
    assert not got.any()
    assert want.any()


def test_what_is_small_or_no_float_or_not_made_up_is_computed(cheap):
    x, small = torch.randn(64, 64), torch.randn(4, 4)
    with torch.no_grad(), Cheaply():
        assert torch.equal(x + 1, x.add(1))
        assert (x + 1).any()  # of the call alone
        made_up = x @ x
        assert not (made_up + 1).any()
        assert torch.equal(made_up > 0, torch.zeros(64, 64, dtype=torch.bool))
        assert torch.equal(made_up.where(x > 0, x), torch.where(x > 0, 0, x))  # a mask's values
        assert not made_up.to("cpu", torch.float64).any()
        assert made_up.add_(1).all()  # in place
        indices = (torch.arange(64)[:, None] * torch.arange(64)).sum()
        assert int(indices) == (63 * 32) ** 2
    want = small @ small
    hollow.COSTLY = 1 << 24
    with torch.no_grad(), Cheaply():
        assert torch.equal(small @ small, want)


def test_made_up_scores_send_tokens_to_every_expert(cheap):
    x, gate = torch.randn(64, 64), torch.randn(64, 8)
    with torch.no_grad(), Cheaply():
        made_up = x @ x
        hollow.COSTLY = 1 << 24  # the scores cost little
        routed = (made_up @ gate).topk(2).indices
    assert set(routed.flatten().tolist()) == set(range(8))


@pytest.mark.parametrize(("width", "real"), [(256, True), (257, False)])
def test_products_are_computed_up_to_a_cost(width, real):
    x = torch.ones(256, width)
    with torch.no_grad(), Cheaply():
        assert bool((x @ torch.ones(width, 256) == width).all()) is real


def test_a_network_of_any_size_takes_no_memory():
    with torch.device("meta"):
        layer = nn.Linear(200_000, 100_000)
    twin = hollow.hollow(layer)
    assert twin.weight.shape == (100_000, 200_000)
    assert twin.weight.untyped_storage().nbytes() < 2e6
    assert twin.weight.device.type == "cpu"
    assert len(set(twin.weight[:50, 0].tolist())) == 50
    assert (twin.bias >= 0).all()  # may be a logarithm's argument
    assert layer.weight.is_meta


def test_buffers_keep_their_values_and_attributes_come_along():
    layer = nn.BatchNorm1d(3)
    layer.table = torch.arange(3)
    layer.gone = torch.ones(2, device="meta")
    twin = hollow.hollow(layer)
    assert torch.equal(twin.running_var, torch.ones(3))
    assert torch.equal(twin.table, layer.table)
    assert twin.gone.device.type == "cpu"
    assert layer.gone.is_meta


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.seen: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(weakref.ref(y := x * 2))
        return x + F.scaled_dot_product_attention(self.q(y), y, y)


def test_a_trace_holds_no_activation():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
                held.append(block.seen[-1]() is not None)
            return x

    held: list[bool] = []
    assert len(discover(Network(), (torch.randn(2, 4, 8),), {}).sites) == 2
    assert held == [False, False]


def test_flex_attention_compiles_again_after_an_error():
    before = getattr(flex, hollow.EAGER_FLEX)
    with pytest.raises(RuntimeError, match="stop"), Cheaply():
        assert getattr(flex, hollow.EAGER_FLEX)
        raise RuntimeError("stop")
    assert getattr(flex, hollow.EAGER_FLEX) == before
