import pytest
import torch
from tiny_spec import tiny_spec
from torch import nn

from dirotq.kernels.linear import QuantLinear, SiteView
from dirotq.models.family import Site
from dirotq.models.swap import footprint, put_packed, swap_sites

SHARED = Site("block.qk", ("block.q", "block.k"), 64, (16, 32), "block", True)
ALONE = Site("block.out", ("block.out",), 64, (8,), "block", False)


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

    def rows(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        return torch.cat([linear(x) for linear in self.linears], -1)[..., rows]


def test_every_consumer_gets_its_own_rows():
    root, x = net(), torch.randn(3, 64)
    q, k = root.block.q, root.block.k
    swap_sites(root, [SHARED], lambda site: Stacked([q, k]))
    assert isinstance(root.block.q, SiteView)
    assert isinstance(root.block.qk, Stacked)
    assert torch.equal(root.block.q(x), q(x))
    assert torch.equal(root.block.k(x), k(x))


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
