import copy

import pytest
import torch
from tiny_packed import packed
from tiny_spec import FP4, tiny_spec
from torch import nn

from dirotq.kernels.linear import PointwiseView, QuantLinear, SiteView
from dirotq.models.family import Site
from dirotq.packed.swap import footprint, put_packed, swap_sites

SHARED = Site("block.qk", ("block.q", "block.k"), 64, (16, 32), "block", True)
POINTWISE = Site("point", ("conv",), 64, (16,), "block", True, pointwise=True)
TWINS = Site("points", ("one", "two"), 64, (16, 8), "block", False, pointwise=True)
ALONE = Site("block.out", ("block.out",), 64, (8,), "block", False)
SITES = (POINTWISE, TWINS)


def net() -> nn.Module:
    root = nn.Module()
    root.block = nn.Module()
    root.block.q, root.block.k = nn.Linear(64, 16), nn.Linear(64, 32)
    root.block.out = nn.Linear(64, 8, bias=False)
    root.norm = nn.LayerNorm(64)
    return root


class Stacked(nn.Module):
    """The consumers of a site, stacked, unquantized."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__()
        self.linears = linears

    def forward(self, x: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        return torch.cat([linear(x) for linear in self.linears], -1)[..., rows]


def test_every_consumer_gets_its_own_rows():
    root, x = net(), torch.randn(3, 64)
    q, k = root.block.q, root.block.k
    swap_sites(root, [SHARED], lambda site: Stacked([q, k]))
    assert isinstance(root.block.q, SiteView)
    assert isinstance(root.block.qk, Stacked)
    assert torch.equal(root.block.q(x), q(x))
    assert torch.equal(root.block.k(x), k(x))


def pointwise_net() -> nn.Module:
    root = nn.Module()
    root.conv = nn.Conv2d(64, 16, 1)
    root.one, root.two = nn.Conv2d(64, 16, 1, bias=False), nn.Conv2d(64, 8, 1, bias=False)
    return root


def as_linear(conv: nn.Conv2d) -> nn.Linear:
    linear = nn.Linear(conv.in_channels, conv.out_channels)
    linear.weight, linear.bias = nn.Parameter(conv.weight.flatten(1)), conv.bias
    return linear


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_pointwise_convolution_becomes_a_view_of_a_linear(memory, dtype):
    root = pointwise_net().to(dtype)
    x = torch.randn(2, 64, 3, 5, dtype=dtype).to(memory_format=memory)
    want = [conv(x) for conv in (root.conv, root.one, root.two)]
    linears = {site: [as_linear(root.get_submodule(c)) for c in site.linears] for site in SITES}
    swap_sites(root, SITES, lambda site: Stacked(linears[site]))
    assert isinstance(root.conv, PointwiseView)
    assert isinstance(root.points, Stacked)
    for conv, expected in zip((root.conv, root.one, root.two), want, strict=True):
        got = conv(x)
        assert got.dtype == dtype
        assert got.stride(1) == 1
        torch.testing.assert_close(got, expected)


def test_a_packed_pointwise_convolution_is_stored_under_the_sites_name():
    root = pointwise_net()
    put_packed(root, [(POINTWISE, tiny_spec(rows=(16,))), (TWINS, tiny_spec(rows=(16, 8)))])
    assert set(root.state_dict()) == {
        "point.qweight", "point.wscale", "point.bias", "points.qweight", "points.wscale",
    }  # fmt: skip
    assert all(tensor.is_meta for tensor in root.state_dict().values())


def test_a_deep_copy_of_a_pointwise_convolution_reads_its_own_site():
    root, x = pointwise_net(), torch.randn(1, 64, 2, 2)
    swap_sites(root, [TWINS], lambda _: packed(tiny_spec(rows=(16, 8)), bias=False))
    twin = copy.deepcopy(root)
    want = root.two(x)
    assert torch.equal(want, root.points(x.movedim(1, -1))[..., 16:].movedim(-1, 1))
    root.points.wscale.zero_()
    assert not root.two(x).any()
    assert torch.equal(twin.two(x), want)


def test_packed_modules_wait_on_the_meta_device():
    root = net()
    specs = {SHARED: tiny_spec(rows=(16, 32)), ALONE: tiny_spec(rows=(8,))}
    put_packed(root, specs.items())
    assert isinstance(root.block.out, QuantLinear)
    assert root.block.out.bias is None
    assert root.block.qk.qweight.is_meta
    assert root.block.k.site is root.block.qk


@pytest.mark.parametrize("rank", [0, 16])
def test_footprint_by_hand(rank):
    root = net()
    spec = tiny_spec(rows=(16, 32), rank=rank, weight_scale="group")
    put_packed(root, [(SHARED, spec)])
    assert footprint(root) == {
        "codes": 48 * 64 // 2,
        "scales": 48 * 4 * 2,
        "basis": 64 * rank * 2,
        "protected": 48 * rank * 2,
        "bias": 48 * 2,
        "kept": (8 * 64 + 2 * 64) * 2,
    }


def test_footprint_counts_the_dense_rotation():
    root = net()
    put_packed(root, [(ALONE, tiny_spec(rows=(8,), rank=16, transform="dense"))])
    assert footprint(root)["basis"] == (64 * 16 + 64 * 48) * 2


@pytest.mark.parametrize(("name", "bits", "apart"), [("nvfp4", 4.5, 4), ("mxfp4", 4.25, 0)])
def test_an_fp4_weight_takes_its_codes_and_a_byte_per_group(name, bits, apart):
    root = net()
    put_packed(root, [(SHARED, tiny_spec(rows=(16, 32), **FP4[name]))])
    size = footprint(root)
    assert 8 * (size["codes"] + size["scales"] - apart) / (48 * 64) == bits
