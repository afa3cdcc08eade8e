"""How many calls one figure is of, and which of the times it is."""

import dataclasses

from dirotq.tuning.timing import LEAST, MOST, copies, summary


def test_enough_calls_to_fill_the_cache_twice():
    assert copies(10, cache=100) == 20
    assert copies(1000, cache=100) == LEAST
    assert copies(1, cache=10**6) == MOST


def test_percentiles():
    assert dataclasses.astuple(summary([5.0, 1.0, 2.0, 3.0, 4.0])) == (2.0, 3.0, 4.0)
    assert dataclasses.astuple(summary([7.0])) == (7.0, 7.0, 7.0)
