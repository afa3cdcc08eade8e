"""What every model family owes. A family's test subclasses this with its tiny transformer."""

import copy
import inspect
from typing import Any

import pytest
import torch
from fused_sites import fused, spec_of
from torch import Tensor, nn

from dirotq.errors import UnsupportedError
from dirotq.kernels.linear import QuantLinear
from dirotq.models.call import Call
from dirotq.models.families import family_of
from dirotq.models.family import ModelFamily, is_linear, is_pointwise
from dirotq.packed.swap import footprint, put_packed, swap_sites


class FamilyContract:
    family: ModelFamily
    text_tokens: int = 5
    """Rows that a site of the text stream sees for each image; no other site sees as many."""
    tolerance: float = 1e-9
    """Of float64 comparisons; larger where the model itself computes in float32."""

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
        linears = [n for n, m in transformer.named_modules() if is_linear(m)]
        claimed = [c for site in sites for c in site.linears]
        assert len(claimed) == len(set(claimed))
        assert set(claimed) < set(linears)
        assert len({site.name for site in sites}) == len(sites)
        for site in sites:
            for consumer, rows in zip(site.linears, site.out_features, strict=True):
                linear = transformer.get_submodule(consumer)
                assert linear.weight.shape[:2] == (rows, site.in_features)
                assert (linear.bias is not None) == site.bias
                assert is_pointwise(linear) == site.pointwise

    def test_the_meta_device_shows_the_same_sites(self):
        real = self.transformer()
        assert self.family.sites(copy.deepcopy(real).to("meta")) == self.family.sites(real)

    def test_an_unknown_linear_is_refused(self):
        transformer = self.transformer()
        transformer.novelty = nn.Linear(4, 4)
        with pytest.raises(UnsupportedError, match=r"says nothing about 1 linear.*novelty"):
            self.family.sites(transformer)

    def test_an_unknown_pointwise_convolution_is_refused(self):
        transformer = self.transformer()
        transformer.novelty = nn.Conv2d(4, 4, 1)
        with pytest.raises(UnsupportedError, match=r"says nothing about 1 linear.*novelty"):
            self.family.sites(transformer)

    def test_every_linear_of_a_block_is_a_site_or_reads_the_text(self):
        transformer = self.transformer()
        sites = self.family.sites(transformer)
        blocks = {site.block for site in sites} - {""}
        assert all(isinstance(transformer.get_submodule(block), nn.Module) for block in blocks)
        claimed = {c for site in sites for c in site.linears}
        inside = [
            name
            for name, module in transformer.named_modules()
            if is_linear(module) and any(name.startswith(f"{block}.") for block in blocks)
        ]
        kept = [name for name in inside if name not in claimed]
        read = self.inputs_read(transformer, kept)
        assert all(x.shape[-2] == self.text_tokens for x in read.values())

    def test_a_mask_is_an_argument_of_the_transformer(self):
        mask = self.family.mask
        if mask is not None:
            assert mask in inspect.signature(self.transformer().forward).parameters
            assert self.inputs()[mask].sum() < self.inputs()[mask].numel()

    def test_sites_of_the_text_stream_see_the_text(self):
        transformer = self.transformer()
        sites = self.family.sites(transformer)
        read = self.inputs_read(transformer, [site.linears[0] for site in sites])
        for site in sites:
            x = read[site.linears[0]]
            assert len(site.tokens_of(x)) == x.numel() // site.in_features
            if not site.pointwise and site.kind == "block":
                assert (x.shape[-2] == self.text_tokens) == site.text, site.name

    def test_consumers_of_a_site_read_one_tensor(self):
        transformer = self.transformer()
        sites = self.family.sites(transformer)
        read = self.inputs_read(transformer, [c for site in sites for c in site.linears])
        for site in sites:
            first, *others = (read[consumer] for consumer in site.linears)
            assert first.shape[1 if site.pointwise else -1] == site.in_features
            for other in others:
                assert other.data_ptr() == first.data_ptr(), site.name
                assert torch.equal(other, first), site.name

    def test_rotating_every_site_leaves_the_output_unchanged(self):
        transformer = self.transformer().double()
        want = self.forward(transformer, torch.float64)
        sites = self.family.sites(transformer)
        swap_sites(transformer, sites, lambda site: fused(transformer, site))
        assert not any(isinstance(transformer.get_submodule(s.name), nn.Linear) for s in sites)
        got = self.forward(transformer, torch.float64)
        assert (got - want).norm() < self.tolerance * want.norm()

    def test_a_copy_of_the_swapped_network_computes_with_its_own_sites(self):
        transformer = self.transformer()
        sites = self.family.sites(transformer)
        swap_sites(transformer, sites, lambda site: fused(transformer, site))
        want = self.forward(transformer)
        twin = copy.deepcopy(transformer)
        for site in sites:
            torch.nn.init.zeros_(transformer.get_submodule(site.name).main)
        assert torch.equal(self.forward(twin), want)
        assert not torch.equal(self.forward(transformer), want)

    def test_names_of_the_packed_tensors_are_those_of_the_sites(self):
        transformer = self.transformer().to("meta")
        before = {name.rpartition(".")[0] for name in transformer.state_dict()}
        sites = self.family.sites(transformer)
        put_packed(transformer, [(site, spec_of(site)) for site in sites])
        after = {name.rpartition(".")[0] for name in transformer.state_dict()}
        assert after - before <= {site.name for site in sites}
        assert {site.name for site in sites} <= after
        assert before - after <= {consumer for site in sites for consumer in site.linears}

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

    def inputs_read(self, transformer: Any, names: list[str]) -> dict[str, Tensor]:
        """What the named modules read in one call; KeyError later for one that was not called."""
        read: dict[str, Tensor] = {}
        for name in names:
            transformer.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: read.update({name: args[0]})
            )
        self.forward(transformer)
        return read

    def forward(self, transformer: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        call = Call((), self.inputs()).map(lambda t: t.to(dtype) if t.is_floating_point() else t)
        with torch.no_grad():
            output = transformer(**call.kwargs, return_dict=False)[0]
        return torch.stack(output) if isinstance(output, list) else output
