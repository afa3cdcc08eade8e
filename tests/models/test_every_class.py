"""Every transformer class of diffusers: its linears are found, and swapping them changes nothing.

Tiny networks of random weights (tests/support/tiny_transformers), traced without weights.
"""

import re

import diffusers
import pytest
import torch
from fused_sites import fused
from tiny_transformers import UNTABLED, classes, made
from tiny_transformers.proof import apart, closed, found, output

from dirotq.models.families import FAMILIES, family_of
from dirotq.models.family import is_linear, is_pointwise
from dirotq.models.skeleton import empty_transformer
from dirotq.packed.swap import swap_sites


def test_every_class_of_diffusers_has_a_row():
    assert sorted([*UNTABLED, *(family.transformer for family in FAMILIES)]) == classes()
    assert {family_of(name).transformer for name in UNTABLED} == set(UNTABLED)


def test_the_page_lists_every_class(pytestconfig):
    page = (pytestconfig.rootpath / "docs" / "models.md").read_text()
    assert re.findall(r"^\| `(\w+)`", page, re.MULTILINE) == classes(), "run make classes"
    tabled = re.findall(r"^\| `(\w+)` \(table\)", page, re.MULTILINE)
    assert sorted(tabled) == sorted(family.transformer for family in FAMILIES), "run make classes"
    assert f"diffusers {diffusers.__version__} " in page, "run make classes, and name the version"
    assert page.count(", refused |") <= len(classes()) - 70


def stored(network):
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("name", UNTABLED)
def test_a_class_is_found_and_stays_what_it_was(name):
    network, inputs = made(name)
    assert stored(empty_transformer(dict(network.config), type(network), buffers=False)) == stored(
        network
    )
    seen = found(network, inputs)
    packed = [linear for site in seen.sites for linear in site.linears]
    assert len(packed) == len(set(packed))
    assert set(packed).isdisjoint(seen.kept)
    linears = {name for name, module in network.named_modules() if is_linear(module)}
    assert linears <= {*packed, *seen.kept}
    for site in seen.sites:
        for linear, rows in zip(site.linears, site.out_features, strict=True):
            module = network.get_submodule(linear)
            assert module.weight.shape[:2] == (rows, site.in_features)
            assert (module.bias is not None, is_pointwise(module)) == (site.bias, site.pointwise)
    want = output(network, inputs)
    with torch.no_grad():
        swap_sites(network, seen.sites, lambda site: fused(network, site))
    assert apart(output(network, inputs), want) <= 1e-12
    closed(network, seen.sites)
    assert apart(output(network, inputs), want) > 1e-3
