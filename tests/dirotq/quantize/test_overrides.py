import dataclasses

import pytest
from tiny_line import method

from dirotq.errors import ConfigError
from dirotq.models.family import Site
from dirotq.quantize.overrides import check_overrides, override_of, parse_overrides

QKV = Site("blocks.0.attn.qkv", ("blocks.0.attn.q", "blocks.0.attn.k"), 64, (8, 8), "block", True)
OUT = Site("blocks.0.attn.out", ("blocks.0.attn.out",), 64, (64,), "block", True)
NORM = Site("blocks.0.norm.linear", ("blocks.0.norm.linear",), 64, (384,), "modulator", True)
SITES = [NORM, QKV, OUT]


def spec(site, *overrides, name="dirotq"):
    return method(name, overrides=list(overrides)).spec(site, 16)


def test_without_overrides_the_method_decides():
    assert spec(QKV) == method("dirotq").spec(QKV, 16)


@pytest.mark.parametrize("pattern", ["*", "blocks.0.attn.qkv", "blocks.*.qkv", "*.[q]kv"])
def test_a_site_that_is_kept_has_no_spec(pattern):
    assert spec(QKV, {"sites": pattern, "keep": 16}) is None


def test_a_modulator_can_be_kept_too_and_ignores_what_only_blocks_have():
    assert spec(NORM, {"sites": "*.norm.*", "keep": 16}) is None
    assert spec(NORM, {"sites": "*", "act_bits": 8}, {"sites": "*", "rank": 32}) == spec(NORM)


@pytest.mark.parametrize(
    ("name", "bits", "scale"),
    [("dirotq", 8, "token"), ("dirotq", 16, "rms"), ("groups", 8, "group"), ("rtn", 8, "group")],
)
def test_finer_activations_take_the_scale_that_they_can_have(name, bits, scale):
    found = spec(QKV, {"sites": "*.qkv", "act_bits": bits}, name=name)
    assert (found.activations.bits, found.activations.name) == (bits, scale)
    assert spec(OUT, {"sites": "*.qkv", "act_bits": bits}, name=name) == spec(OUT, name=name)


def test_a_rank_takes_the_place_of_any_other():
    assert spec(QKV, {"sites": "*.qkv", "rank": 32}).rank == 32
    assert spec(QKV, {"sites": "*.qkv", "rank": 0}).rank == 0


def test_all_entries_that_match_count_and_later_ones_win():
    parsed = parse_overrides(
        [{"sites": "*", "rank": 8}, {"sites": "*.qkv", "act_bits": 8, "rank": 24, "why": "noisy"}]
    )
    both = override_of(parsed, QKV)
    assert (both.rank, both.act_bits) == (24, 8)
    assert "override *: rank 8" in both.why
    assert "noisy: 8-bit activations, rank 24" in both.why
    assert override_of(parsed, OUT).rank == 8
    assert override_of(parsed, NORM) is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"sites": "*"}, r"overrides\[0\].*needs `sites`, a pattern, and one of keep, act_bits"),
        ({"keep": 16}, r"overrides\[0\].*needs `sites`"),
        ({"sites": 3, "keep": 16}, "needs `sites`, a pattern"),
        ({"sites": "*", "bits": 8}, r"is no override: its keys are sites, keep, act_bits, rank"),
        ("blocks.*", "is no override"),
        ({"sites": "*", "keep": 8}, r"overrides\[0\]\.keep=8: use 16"),
        ({"sites": "*", "act_bits": 5}, r"overrides\[0\]\.act_bits=5: use 4 or 8 or 16"),
        ({"sites": "*", "rank": -8}, r"overrides\[0\]\.rank=-8: use 0 or more"),
        ({"sites": "*", "rank": 1.5}, r"overrides\[0\]\.rank=1\.5"),
        ({"sites": "*", "keep": 16, "rank": 8}, "kept in 16 bits has no rank"),
    ],
)
def test_entries_that_say_nothing_or_too_much(entry, message):
    with pytest.raises(ConfigError, match=message):
        method("dirotq", overrides=[entry])


def test_a_rank_for_a_method_that_protects_nothing():
    with pytest.raises(ConfigError, match=r"overrides\[0\]\.rank=8: method rtn protects no dir"):
        method("rtn", overrides=[{"sites": "*", "rank": 8}])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"sites": "blocks.0.attn.qkw", "keep": 16},
            r"overrides\[0\]\.sites='blocks\.0\.attn\.qkw' matches none of the model's 3 sites; "
            r"the closest are blocks\.0\.attn\.qkv, ",
        ),
        ({"sites": "*.norm.*", "act_bits": 8}, r"matches modulators only \(blocks\.0\.norm"),
        ({"sites": "*", "rank": 12}, r"overrides\[0\]\.rank=12 is not on the grid: .*of 8"),
        ({"sites": "*.attn.*", "keep": 16}, "every block site in 16 bits"),
    ],
)
def test_entries_that_do_not_fit_the_model(entry, message):
    with pytest.raises(ConfigError, match=message):
        check_overrides(parse_overrides([entry]), SITES, grid=8)


def test_entries_that_fit():
    check_overrides(parse_overrides([{"sites": "*.out", "keep": 16}]), SITES, grid=8)


def test_overrides_change_the_recipe_of_a_method():
    from dirotq.pipeline.stage import recipe

    plain = method("dirotq")
    changed = dataclasses.replace(plain, overrides=[{"sites": "*", "keep": 16}])
    assert recipe(plain) != recipe(changed)
