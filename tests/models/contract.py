"""What every model family owes. A family's test subclasses this with its tiny transformer."""

import copy
from typing import Any

import pytest
import torch
from tiny_spec import tiny_spec
from torch import Tensor, nn

from dirotq.errors import UnsupportedError
from dirotq.kernels.hadamard import hadamard_block
from dirotq.kernels.linear import QuantLinear
from dirotq.kernels.spec import QuantSpec
from dirotq.models.families import family_of
from dirotq.models.family import ModelFamily, Site
from dirotq.models.swap import footprint, put_packed, swap_sites
from dirotq.rotation import Rotation
from dirotq.stages.fuse import FusedLinear


class FamilyContract:
    family: ModelFamily

    def transformer(self) -> Any:
        """A tiny random transformer in eval mode."""
        raise NotImplementedError

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of one forward call."""
        raise NotImplementedError

    def test_the_class_finds_its_family(self):
        assert family_of(type(self.transformer()).__name__) is self.family

    def test_every_linear_is_claimed_once_or_kept(self):
        transformer = self.transformer()
        sites = self.family.sites(transformer)
        linears = [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear)]
        claimed = [c for site in sites for c in site.consumers]
        assert len(claimed) == len(set(claimed))
        assert set(claimed) < set(linears)
        assert len({site.name for site in sites}) == len(sites)
        for site in sites:
            for consumer, rows in zip(site.consumers, site.rows, strict=True):
                linear = transformer.get_submodule(consumer)
                assert (linear.in_features, linear.out_features) == (site.dim, rows)
                assert (linear.bias is not None) == site.bias

    def test_the_meta_device_shows_the_same_sites(self):
        real = self.transformer()
        assert self.family.sites(copy.deepcopy(real).to("meta")) == self.family.sites(real)

    def test_an_unknown_linear_is_refused(self):
        transformer = self.transformer()
        transformer.novelty = nn.Linear(4, 4)
        with pytest.raises(UnsupportedError, match=r"says nothing about 1 linear.*novelty"):
            self.family.sites(transformer)

    def test_consumers_of_a_site_read_one_tensor(self):
        transformer = self.transformer()
        read: dict[str, Tensor] = {}
        for site in self.family.sites(transformer):
            for consumer in site.consumers:
                transformer.get_submodule(consumer).register_forward_pre_hook(
                    lambda _, args, consumer=consumer: read.update({consumer: args[0]})
                )
        self.forward(transformer)
        for site in self.family.sites(transformer):
            first, *others = (read[consumer] for consumer in site.consumers)
            assert first.shape[-1] == site.dim
            for other in others:
                assert other.data_ptr() == first.data_ptr(), site.name
                assert torch.equal(other, first), site.name

    def test_rotating_every_site_leaves_the_output_unchanged(self):
        transformer = self.transformer().double()
        want = self.forward(transformer, torch.float64)
        sites = self.family.sites(transformer)
        swap_sites(transformer, sites, lambda site: fused(transformer, site))
        got = self.forward(transformer, torch.float64)
        assert not any(isinstance(transformer.get_submodule(s.name), nn.Linear) for s in sites)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)

    def test_shapes_alone_tell_what_the_packed_model_weighs(self):
        real, meta = self.transformer(), self.transformer().to("meta")
        entries = [(site, spec_of(site)) for site in self.family.sites(real)]
        put_packed(meta, entries)
        swap_sites(
            real, dict(entries), lambda s: QuantLinear(dict(entries)[s], bias=s.bias, device="cpu")
        )
        stored = real.to(torch.bfloat16).state_dict()
        size = footprint(meta)
        assert footprint(real) == size
        assert sum(size.values()) == sum(t.numel() * t.element_size() for t in stored.values())

    def forward(self, transformer: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        inputs = {
            k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in self.inputs().items()
        }
        with torch.no_grad():
            return transformer(**inputs, return_dict=False)[0]


def spec_of(site: Site) -> QuantSpec:
    rank = 8 if site.kind == "block" else 0
    return tiny_spec(dim=site.dim, rows=site.rows, rank=rank, block=hadamard_block(site.dim, 64))


def fused(transformer: nn.Module, site: Site) -> FusedLinear:
    """The site, rotated but not quantized, in the precision of the transformer."""
    spec = spec_of(site)
    vectors = torch.linalg.qr(torch.randn(site.dim, site.dim, dtype=torch.float64)).Q
    linears = [transformer.get_submodule(c) for c in site.consumers]
    weight = torch.cat([linear.weight.detach() for linear in linears])
    bias = torch.cat([linear.bias.detach() for linear in linears]) if site.bias else None
    return FusedLinear(Rotation.cut(vectors, spec), weight, bias)
