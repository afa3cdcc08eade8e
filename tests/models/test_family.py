import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from dirotq.errors import UnsupportedError
from dirotq.models.families import family_of
from dirotq.models.family import ModelFamily, Site, SiteRule


class Attention(nn.Module):
    def __init__(self, text: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(text, 4)


class Net(nn.Module):
    def __init__(self, **options: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(**options), Attention(**options)])
        self.out = nn.Linear(8, 8, bias=False)


FAMILY = ModelFamily(
    name="net",
    transformer="Net",
    rules=(SiteRule("blocks.*", ("q", "k", "v"), name="qkv"),),
    keep=("out",),
    call={},
)


def with_rules(*rules: SiteRule, keep: tuple[str, ...] = ("out",)) -> ModelFamily:
    return dataclasses.replace(FAMILY, rules=rules, keep=keep)


def test_consumers_stack_in_the_order_of_the_rule():
    first, second = FAMILY.sites(Net())
    assert first == Site(
        "blocks.0.qkv",
        ("blocks.0.q", "blocks.0.k", "blocks.0.v"),
        in_features=8,
        out_features=(8, 4, 4),
        kind="block",
        bias=True,
    )
    assert second.name == "blocks.1.qkv"
    assert list(first.slices()) == [
        ("blocks.0.q", slice(0, 8)),
        ("blocks.0.k", slice(8, 12)),
        ("blocks.0.v", slice(12, 16)),
    ]


def test_a_site_with_one_consumer_is_named_after_it():
    family = with_rules(
        SiteRule("blocks.*", ("q",), name="never"), SiteRule("", ("out",)), keep=("blocks.*.*",)
    )
    with pytest.raises(UnsupportedError, match=r"blocks\.0\.q is claimed twice.*keep"):
        family.sites(Net())
    family = dataclasses.replace(family, keep=("blocks.*.k", "blocks.*.v"))
    assert [s.name for s in family.sites(Net())] == ["out", "blocks.0.q", "blocks.1.q"]


def test_consumers_that_a_variant_lacks_are_left_out():
    net = Net()
    del net.blocks[1].v
    assert [s.out_features for s in FAMILY.sites(net)] == [(8, 4, 4), (8, 4)]


def test_a_star_stands_for_one_component():
    family = with_rules(SiteRule("*", ("q", "k", "v"), name="qkv"))
    with pytest.raises(UnsupportedError, match=r"nothing about 6 linear.*e\.g\. blocks\.0\.q"):
        family.sites(Net())


def test_claimed_by_two_rules():
    family = with_rules(*FAMILY.rules, SiteRule("blocks.0", ("v",)))
    with pytest.raises(UnsupportedError, match=r"blocks\.0\.v is claimed twice: by site blocks"):
        family.sites(Net())


def test_consumers_of_different_inputs_are_no_site():
    with pytest.raises(UnsupportedError, match=r"blocks\.0\.qkv.*\[6, 8\] channels"):
        FAMILY.sites(Net(text=6))
    net = Net()
    net.blocks[0].k.bias = None
    with pytest.raises(UnsupportedError, match=r"blocks\.0\.qkv.*differ in having a bias"):
        FAMILY.sites(net)


def with_convolution(**options: Any) -> Net:
    net = Net()
    net.point = nn.Conv2d(8, 6, 1, **options)
    return net


def test_a_pointwise_convolution_is_a_site_under_a_name_of_its_own():
    family = with_rules(*FAMILY.rules, SiteRule("", ("point",), name="inner"))
    *_, site = sorted(family.sites(with_convolution()), key=lambda site: site.pointwise)
    assert site == Site("inner", ("point",), 8, (6,), "block", True, pointwise=True)
    x = torch.randn(2, 8, 3, 5)
    assert torch.equal(site.tokens_of(x), x.permute(0, 2, 3, 1).reshape(30, 8))


def test_a_pointwise_convolution_is_kept_or_refused():
    with pytest.raises(UnsupportedError, match=r"nothing about 1 linear.*e\.g\. point;"):
        FAMILY.sites(with_convolution())
    assert with_rules(*FAMILY.rules, keep=("out", "point")).sites(with_convolution())


def test_a_pointwise_convolution_needs_the_name_of_its_site():
    family = with_rules(*FAMILY.rules, SiteRule("", ("point",)))
    with pytest.raises(UnsupportedError, match="rule for point names no site"):
        family.sites(with_convolution())


@pytest.mark.parametrize("options", [{"groups": 2}, {"stride": 2}, {"padding": 1}])
def test_other_convolutions_mix_more_than_channels(options):
    assert all(not site.pointwise for site in FAMILY.sites(with_convolution(**options)))


def test_a_linear_and_a_convolution_are_no_site():
    net = with_convolution()
    net.twin = nn.Linear(8, 6)
    family = with_rules(*FAMILY.rules, SiteRule("", ("point", "twin"), name="both"))
    with pytest.raises(UnsupportedError, match="differ in being 1x1 convolutions"):
        family.sites(net)


def test_a_rule_says_whether_its_sites_read_text():
    family = with_rules(SiteRule("blocks.*", ("q", "k", "v"), name="qkv", text=True))
    assert all(site.text for site in family.sites(Net()))
    assert not any(site.text for site in FAMILY.sites(Net()))


def test_a_site_lies_in_a_block_or_at_the_top():
    first, _ = FAMILY.sites(Net())
    assert first.block == "blocks.0"
    (top,) = with_rules(SiteRule("", ("out",)), keep=("blocks.*.*",)).sites(Net())
    assert top.block == ""


def test_another_class_is_not_guessed():
    with pytest.raises(UnsupportedError, match="describes Net, this model has a Attention"):
        FAMILY.sites(Attention())


def test_unknown_families_name_the_known_ones():
    assert family_of("FluxTransformer2DModel").name == "flux"
    with pytest.raises(
        UnsupportedError,
        match=r"'UNet2D' is no transformer class.*described are flux \(FluxTransformer2D",
    ):
        family_of("UNet2D")
