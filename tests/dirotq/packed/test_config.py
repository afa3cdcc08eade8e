import copy
import json
import time

import pytest
from diffusers import FluxTransformer2DModel
from fuzz_packed import odd_values
from hypothesis import given
from tiny_line import build_transformer

from dirotq.errors import ArtifactError, DirotqError, UnsupportedError
from dirotq.kernels.formats.lm4 import LEVELS
from dirotq.packed.config import FORMAT, WIDEST, check_places, read_packing
from dirotq.quantizer import DirotqConfig


@pytest.fixture(scope="module")
def sites(finished):
    """Those of a packed folder, as if their weights were integers."""
    file = finished["pack"].data / "model" / "transformer" / "config.json"
    sites = json.loads(file.read_text())["quantization_config"]["sites"]
    for entry in sites:
        entry["spec"]["weight_scale"] = entry["spec"]["weight_scale"].removeprefix("lm4_")
    return sites


def shared(sites) -> int:
    """Which site has three consumers."""
    return next(i for i, s in enumerate(sites) if s["site"]["name"].endswith(".qkv"))


def changed(sites, change) -> list:
    """A copy with ``change`` made to the site that q, k and v share."""
    sites = copy.deepcopy(sites)
    change(sites[shared(sites)])
    return sites


def test_what_was_written_is_read(sites):
    entries = read_packing(sites, FORMAT)
    assert DirotqConfig.of(entries).sites == sites
    check_places(build_transformer(), entries)


def test_fields_that_came_later_may_be_missing(sites):
    def old(entry):
        for name in ("pointwise", "text"):
            del entry["site"][name]

    assert read_packing(changed(sites, old), 1) == read_packing(sites, 1)


@pytest.mark.parametrize("number", [0, -1, "2", True, None, 1.0, float("nan"), [2]])
def test_a_format_that_is_no_number_is_refused(sites, number):
    with pytest.raises(ArtifactError, match=r"format is .* not a number from 1 to 3"):
        read_packing(sites, number)


def test_a_config_without_its_format_is_refused(sites):
    with pytest.raises(ArtifactError, match="format is None, not a number from 1 to 3"):
        DirotqConfig.from_dict({"sites": sites, "quant_method": "dirotq"})


def test_formats_up_to_the_newest_are_read(sites):
    for number in (1, FORMAT):
        read_packing(sites, number)
    with pytest.raises(UnsupportedError, match="Upgrade"):
        read_packing(sites, FORMAT + 1)


@pytest.fixture(scope="module")
def of_levels(sites):
    """The same sites with LM4 weights."""
    sites = copy.deepcopy(sites)
    for entry in sites:
        kept = entry["spec"]["weight_scale"]
        entry["spec"]["weight_scale"] = f"lm4_{kept}"
    return sites


def test_levels_are_said_where_they_are_used(sites, of_levels):
    entries = read_packing(of_levels, FORMAT, list(LEVELS))
    written = DirotqConfig.of(entries)
    assert (written.format, written.to_dict()["levels"]) == (3, list(LEVELS))
    assert DirotqConfig(**json.loads(json.dumps(written.to_dict()))).entries() == entries
    older = DirotqConfig.of(read_packing(sites, FORMAT)).to_dict()
    assert older["format"] == 2 and "levels" not in older


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (None, "it lacks levels, and the weights of .* are LM4"),
        ([], r"levels is \[\]; LM4's are \[0\.25, 0\.8125, "),
        ([*LEVELS[:-1], 7.0], r"levels is .*7\.0\]; LM4's are .*6\.0\]"),
        ([*LEVELS, 8.0], "LM4's are"),
        (LEVELS[::-1], "LM4's are"),
        ([float("nan")] * 8, "levels is .nan"),
        ([*LEVELS[:3], 2, *LEVELS[4:]], "LM4's are"),
        ("0.25", "levels is '0.25'"),
        ({"lm4": 1}, "levels is {'lm4': 1}"),
    ],
)
def test_levels_that_are_not_the_formats_are_refused(of_levels, levels, message):
    levels = list(levels) if isinstance(levels, tuple) else levels
    with pytest.raises(ArtifactError, match=message):
        read_packing(of_levels, FORMAT, levels)


def test_levels_of_no_site_are_refused(sites):
    with pytest.raises(ArtifactError, match=r"it has levels .*, and no site has LM4 weights"):
        read_packing(sites, FORMAT, list(LEVELS))


@pytest.mark.parametrize("value", [None, {}, "sites", 3, float("nan")])
def test_sites_are_a_list(value):
    with pytest.raises(ArtifactError, match="not a list"):
        read_packing(value, 1)


def put(part: str, **values):
    return lambda entry: entry[part].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("site", dim=10**9), rf"dim is 1000000000, not a whole number from 1 to {WIDEST}"),
        (put("spec", dim=10**9), "dim is 1000000000"),
        (put("site", dim=0), "dim is 0"),
        (put("spec", dim=-64), "dim is -64"),
        (put("spec", dim=float("nan")), "dim is nan"),
        (put("site", dim=64.0), r"dim is 64\.0"),
        (put("site", dim=True), "dim is True"),
        (put("site", dim="64"), "dim is '64'"),
        (put("site", dim=32), "has 32 channels .* its spec 64"),
        (put("site", rows=[64, 64]), "3 consumers and 2 numbers of rows"),
        (put("site", rows=[64, 64, 0]), "rows is 0"),
        (put("site", rows=[64, 64, 32]), "its spec 64"),
        (put("site", rows=192), "not a list of numbers"),
        (put("site", consumers=[]), "0 consumers"),
        (put("site", consumers="abc"), "no path of a module"),
        (put("site", consumers=["a", "a", "b"]), "3 consumers"),
        (put("site", consumers=["a", "b", "../c"]), r"'\.\./c', which is no path"),
        (put("site", name=""), "'', which is no path"),
        (put("site", name="a..b"), r"'a\.\.b', which is no path"),
        (put("site", name="__class__.\0"), "no path of a module"),
        (put("site", name=["a"]), "no path of a module"),
        (put("site", kind="other"), "kind 'other'"),
        (put("site", kind=[]), "kind"),
        (put("site", bias=1), "bias is 1"),
        (put("site", foreign=1), "unknown fields: foreign"),
        (put("spec", foreign=1), "unknown fields: foreign"),
        (lambda e: e["site"].pop("bias"), "lacks bias"),
        (lambda e: e["spec"].pop("rank"), "lacks rank"),
        (lambda e: e.pop("spec"), "not an object of `site` and `spec`"),
        (lambda e: e.update(spec=3), "is 3, not an object"),
        (put("spec", transform=["dense"]), "not a text"),
        (put("spec", transform="fourier"), "'fourier' is not"),
        (put("spec", weight_group=0, weight_scale="group"), "group 0 does not divide"),
        (put("spec", rank=65), "rank 65 is not in 0 ... 64"),
        (put("spec", smooth="yes"), "smooth is 'yes'"),
    ],
)
def test_an_odd_site_is_refused(sites, change, message):
    with pytest.raises(ArtifactError, match=message):
        read_packing(changed(sites, change), FORMAT)


def test_a_name_belongs_to_one_site(sites):
    with pytest.raises(ArtifactError, match="belongs to the sites"):
        read_packing([*sites, sites[0]], FORMAT)


@given(value=odd_values)
def test_only_our_errors_leave(value):
    for call in (
        lambda: read_packing(value, 1),
        lambda: read_packing([value], 1),
        lambda: read_packing([{"site": value, "spec": value}], 1),
        lambda: read_packing([], value),
        lambda: DirotqConfig.from_dict({"sites": value, "format": value, "quant_method": value}),
    ):
        try:
            call()
        except DirotqError:
            continue


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("site", consumers=["x_embedder.foo", "a", "b"]), "x_embedder.foo is no linear"),
        (
            put("site", consumers=[f"transformer_blocks.7.attn.to_{c}" for c in "qkv"]),
            "is no linear of a FluxTransformer2DModel",
        ),
        (put("site", name="transformer_blocks.0.attn.norm_q"), "its path is taken"),
        (put("site", name="transformer_blocks.0.attn.forward"), "its path is taken"),
        (put("site", name="nowhere.qkv"), "leads nowhere"),
        (put("site", name="x_embedder.qkv"), "its path is taken"),
        (put("site", bias=False), r"\(64, 64, True, False\) .* \(64, 64, False, False\)"),
        (put("site", pointwise=True), r"\(64, 64, True, False\) .* \(64, 64, True, True\)"),
        (
            put("site", consumers=[f"transformer_blocks.0.attn.to_{c}" for c in "kqv"]),
            "has the consumers",
        ),
    ],
)
def test_sites_have_their_place_in_the_transformer(sites, change, message):
    entries = read_packing(changed(sites, change), FORMAT)
    with pytest.raises(ArtifactError, match=message):
        check_places(build_transformer(), entries)


def test_other_dimensions_than_the_linears(sites):
    def narrow(entry):
        put("site", dim=32)(entry)
        put("spec", dim=32, act_group=32, block=32)(entry)

    entries = read_packing(changed(sites, narrow), FORMAT)
    with pytest.raises(ArtifactError, match=r"has \(outputs, inputs, .*\) = \(64, 64, "):
        check_places(build_transformer(), entries)


def test_a_million_blocks_are_refused_at_once(packed_folder):
    import dirotq
    from dirotq.files.sums import write_sums

    file = packed_folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"num_single_layers": 1_000_000}))
    write_sums(packed_folder)
    start = time.monotonic()
    with pytest.raises(ArtifactError, match=r"num_single_layers = 1000000, more than what has"):
        dirotq.load(packed_folder, device="cpu")
    assert time.monotonic() - start < 1
    assert FluxTransformer2DModel.load_config(packed_folder, subfolder="transformer")
