"""Which sites get finer activations: by number, or where it is worth it."""

import math

import pytest

from dirotq.errors import ConfigError
from dirotq.quantize.overrides import parse_overrides
from dirotq.quantize.sensitive import (
    LEAST_GAIN,
    MOST_WORK,
    gain_db,
    parse_sensitive,
    worthwhile,
)

ERRORS = {"a": 1.0, "b": 6.0, "c": 3.0}


def test_the_worst_become_overrides_with_their_reason():
    entries = parse_sensitive({"count": 2, "act_bits": 8}, 4).worst(ERRORS)
    assert [(entry["sites"], entry["act_bits"]) for entry in entries] == [("b", 8), ("c", 8)]
    [first, second] = parse_overrides(entries)
    assert first.told == "number 1 in measured error (60.0% of the sum): 8-bit activations"
    assert second.why == "number 2 in measured error (30.0% of the sum)"
    kept = parse_sensitive({"count": 9, "keep": 16}, 4).worst(ERRORS)
    assert [(entry["sites"], entry["keep"]) for entry in kept] == [("b", 16), ("c", 16), ("a", 16)]


def test_none_is_asked_for():
    assert parse_sensitive(None, 4) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"count": 0, "keep": 16}, r"rank\.sensitive\.count=0: use at least 1"),
        ({"keep": 16}, r"rank\.sensitive\.count=None"),
        ({"count": 2}, "says no finer precision"),
        ({"count": 2, "keep": 16, "act_bits": 8}, "says no finer precision"),
        ({"count": 2, "keep": 8}, "says no finer precision"),
        ({"count": 2, "act_bits": 4}, "says no finer precision"),
        ({"count": 2, "rank": 8}, r"rank\.sensitive=\{'count': 2, 'rank': 8\}: write"),
        (3, r"rank\.sensitive=3: write"),
    ],
)
def test_what_says_nothing_or_too_much(value, message):
    with pytest.raises(ConfigError, match=message):
        parse_sensitive(value, 4)


def test_what_is_no_finer_than_the_method():
    with pytest.raises(ConfigError, match=r"act_bits=8 is no finer than the method's 8-bit"):
        parse_sensitive({"count": 1, "act_bits": 8}, 8)


def test_auto_asks_for_eight_bits_where_they_are_finer():
    asked = parse_sensitive("auto", 4)
    assert (asked.count, asked.keep, asked.act_bits) == (None, None, 8)
    assert parse_sensitive("auto", 8) is None
    assert parse_sensitive("auto", 16) is None
    with pytest.raises(ConfigError, match=r"rank\.sensitive='automatic': write auto"):
        parse_sensitive("automatic", 4)


def gaining(decibels: float, total: float) -> float:
    """The part of a sum whose loss lowers it by so many dB."""
    return total * (1 - 10 ** (-decibels / 10))


@pytest.mark.parametrize(("decibels", "taken"), [(LEAST_GAIN * 1.01, 1), (LEAST_GAIN * 0.99, 0)])
def test_a_site_is_taken_from_the_least_gain_on(decibels, taken):
    gain = gaining(decibels, 100.0)
    found = worthwhile({"a": gain + 1, "b": 99 - gain}, {"a": 1.0}, {"a": 0.01, "b": 0.01})
    assert [entry["sites"] for entry in found] == ["a"] * taken


@pytest.mark.parametrize(("share", "taken"), [(MOST_WORK, ["b"]), (MOST_WORK * 1.01, [])])
def test_a_site_must_fit_the_arithmetic(share, taken):
    found = worthwhile({"a": 5.0, "b": 5.0}, {"b": 1.0}, {"a": 0.5, "b": share})
    assert [entry["sites"] for entry in found] == taken


def test_what_does_not_fit_any_more_is_passed_over():
    errors, finer = {"a": 9.0, "b": 8.0, "c": 3.0}, {"a": 0.0, "b": 0.0, "c": 0.0}
    found = worthwhile(errors, finer, {"a": 0.06, "b": 0.06, "c": 0.04})
    assert [(entry["sites"], entry["act_bits"]) for entry in found] == [("a", 8), ("c", 8)]
    assert found[0]["why"] == "gains 2.60 dB for 6.0% of the arithmetic"
    assert found[1]["why"] == "gains 1.38 dB for 4.0% of the arithmetic"  # of what is left


def test_the_largest_gain_per_share_comes_first():
    errors = {"a": 9.0, "b": 8.0, "c": 2.0}
    shares = {"a": 0.09, "b": 0.02, "c": 0.02}
    found = worthwhile(errors, dict.fromkeys(errors, 0.0), shares)
    assert [entry["sites"] for entry in found] == ["b", "c"]


def test_small_sites_do_not_keep_out_a_larger_gain():
    errors = {"a": 9.0, "b": 4.0, "c": 2.0}
    shares = {"a": 0.09, "b": 0.02, "c": 0.02}
    found = worthwhile(errors, dict.fromkeys(errors, 0.0), shares)
    assert [entry["sites"] for entry in found] == ["a"]


def test_gains():
    assert gain_db(10.0, 9.0) == pytest.approx(10.0)
    assert (gain_db(1.0, 0.0), gain_db(1.0, -1.0), gain_db(0.0, 0.0)) == (0.0, 0.0, 0.0)
    assert gain_db(1.0, 1.0) == math.inf
