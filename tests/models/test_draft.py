"""A drafted table has the very sites that it was drafted from."""

import pytest
import torch
from tiny_families import TINY

from dirotq.models.discovery import discover
from dirotq.models.draft import draft, family_name, source
from dirotq.models.family import ModelFamily, Site, is_linear


def linears(transformer):
    return [name for name, module in transformer.named_modules() if is_linear(module)]


def kept(transformer, sites):
    packed = {linear for site in sites for linear in site.linears}
    return [name for name in linears(transformer) if name not in packed]


def read(text: str) -> ModelFamily:
    """Run the file that was drafted."""
    names: dict[str, object] = {}
    exec(text.replace("from .family", "from dirotq.models.family"), names)
    (family,) = (value for value in names.values() if isinstance(value, ModelFamily))
    return family


def by_name(sites):
    return sorted(sites, key=lambda site: site.name)


@pytest.mark.parametrize("name", TINY)
def test_a_table_becomes_itself(name):
    tiny = TINY[name]
    transformer = tiny.build()
    sites = tiny.family.sites(transformer)
    made = draft(
        tiny.family.transformer, sites, kept(transformer, sites), tiny.family.call, tiny.family.mask
    )
    again = read(source(made))
    assert again == made
    assert by_name(again.sites(transformer)) == by_name(sites)
    assert (again.call, again.mask) == (tiny.family.call, tiny.family.mask)


@pytest.mark.parametrize("name", TINY)
def test_what_is_discovered_becomes_a_table(name):
    transformer = TINY[name].build(**{"guidance_embeds": True} if name == "flux" else {})
    found = discover(transformer, (), TINY[name].inputs())
    again = read(source(draft(type(transformer).__name__, found.sites, found.kept, {})))
    assert by_name(again.sites(transformer)) == by_name(found.sites)


class Uneven(torch.nn.Module):
    """Two blocks, the second of which keeps what the first one packs, and lacks a linear."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.ModuleDict() for _ in range(2))
        for number, block in enumerate(self.blocks):
            for name in ("q", "k", "up")[number:]:
                block[name] = torch.nn.Linear(4, 4)
        self.out = torch.nn.Linear(4, 4)


def test_blocks_that_differ():
    transformer = Uneven()
    one = Site("blocks.0.qk", ("blocks.0.q", "blocks.0.k"), 4, (4, 4), "block", True)
    two = Site("blocks.1.k", ("blocks.1.k",), 4, (4,), "block", True)
    up = Site("blocks.0.up", ("blocks.0.up",), 4, (4,), "block", True)
    made = draft("Uneven", [one, up, two], ["blocks.1.up", "out"], {})
    assert by_name(made.sites(transformer)) == by_name([one, up, two])
    assert "blocks.1.up" in made.keep


@pytest.mark.parametrize(
    ("transformer", "name"),
    [
        ("CogView4Transformer2DModel", "cog_view4"),
        ("QwenImageTransformer2DModel", "qwen_image"),
        ("WanTransformer3DModel", "wan"),
        ("DiT", "dit"),
        ("Transformer2DModel", "transformer2dmodel"),
    ],
)
def test_names_of_families(transformer, name):
    assert family_name(transformer) == name
