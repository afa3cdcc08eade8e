"""Recipes, plans and packed folders of the versions that had flat methods and specs stay as they
were: methods_as_recorded.json was written by commit 93eb306."""

import json
from pathlib import Path

import pytest
from tiny_line import method

from dirotq.kernels.formats.spec import QuantSpec
from dirotq.models.family import Site
from dirotq.packed.config import read_packing
from dirotq.pipeline.stage import recipe
from dirotq.quantize.plan import SitePlan, read_plan, write_plan
from dirotq.quantizer import DirotqConfig

SITES = (
    Site("a.qkv", ("a.q", "a.k", "a.v"), 96, (8, 8, 16), "block", True),
    Site("a.norm.linear", ("a.norm.linear",), 64, (384,), "modulator", True),
)
RECORDED = json.loads(Path(__file__).with_name("methods_as_recorded.json").read_text())


INTEGERS = ("dirotq", "dirotq_w4a8", "dirotq_w4a8_int8")
"""Methods of the default weight format, which was ``int4_channel`` then."""


def method_then(name):
    return method(name, *(["weight_format=int4_channel"] if name in INTEGERS else []))


@pytest.fixture(params=RECORDED)
def name(request):
    return request.param


def test_every_method_that_there_was_is_there(pytestconfig):
    methods = {file.stem for file in (pytestconfig.rootpath / "conf/method").glob("*.yaml")}
    assert methods >= RECORDED.keys()


def test_a_recipe_is_what_it_was(name):
    assert recipe(method_then(name)) == RECORDED[name]["recipe"]


def test_a_plan_has_the_same_bytes(name, tmp_path):
    used, old = method_then(name), RECORDED[name]["plan"]
    plan = [SitePlan(site, used.spec(site, 16), "gptq", True, "because") for site in SITES]
    write_plan(tmp_path / "plan.json", plan)
    rows = [
        {"site": site.recorded(), "spec": spec, "rounding": "gptq", "clip": True, "why": "because"}
        for site, spec in zip(SITES, old, strict=True)
    ]
    assert (tmp_path / "plan.json").read_text() == json.dumps(rows, indent=1) + "\n"
    assert read_plan(tmp_path / "plan.json") == plan


def test_a_packed_folder_has_the_same_bytes_and_loads(name):
    specs = [method_then(name).spec(site, 16) for site in SITES]
    written = DirotqConfig.of(list(zip(SITES, specs, strict=True)))
    assert written.format == RECORDED[name]["format"]
    assert [json.dumps(s["spec"]) for s in written.sites] == [
        json.dumps(spec) for spec in RECORDED[name]["packed"]
    ]
    old = json.loads(json.dumps(written.sites))
    for entry, spec in zip(old, RECORDED[name]["packed"], strict=True):
        entry["spec"] = spec
    assert read_packing(old, written.format) == list(zip(SITES, specs, strict=True))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("scale", ["token", "pow2", "rms", "group", "nvfp4", "mxfp4"])
def test_every_scale_round_trips_or_is_refused(bits, scale):
    """Also of 16-bit activations, whose scale means nothing and is written down all the same."""
    flat = QuantSpec.from_dict(RECORDED["dirotq"]["packed"][0]).to_dict() | {
        "act_bits": bits,
        "act_scale": scale,
    }
    if "fp4" in scale:
        sides = {"weight_scale": scale, "act_group": {"nvfp4": 16, "mxfp4": 32}[scale]}
        flat |= sides | {"weight_group": sides["act_group"]}
    if ("fp4" in scale and bits != 4) or (scale, bits) == ("pow2", 8):
        with pytest.raises(ValueError, match=r"4 bits, not|leave INT8"):
            QuantSpec.from_dict(flat)
    else:
        assert QuantSpec.from_dict(flat).to_dict() == flat
