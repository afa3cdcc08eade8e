"""Water-filling against every allocation there is."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq.errors import NumericalError
from dirotq.quantize.budget import water_fill

FALLING = st.lists(st.integers(0, 50), min_size=0, max_size=4).map(lambda g: sorted(g)[::-1])
SITES = st.lists(FALLING, min_size=1, max_size=4)


def tensors(gains):
    return [torch.tensor(g, dtype=torch.float64) for g in gains]


def gained(gains, steps):
    return sum(sum(g[:n]) for g, n in zip(gains, steps, strict=True))


def paid(prices, steps):
    return sum(p * n for p, n in zip(prices, steps, strict=True))


def best(gains, prices, budget):
    """The most that any allocation within the budget gains."""
    every = itertools.product(*(range(len(g) + 1) for g in gains))
    return max(gained(gains, steps) for steps in every if paid(prices, steps) <= budget)


@settings(max_examples=150, deadline=None)
@given(SITES, st.integers(0, 14))
def test_with_equal_prices_no_allocation_gains_more(gains, budget):
    steps, left = water_fill(tensors(gains), [1.0] * len(gains), budget)
    assert gained(gains, steps) == best(gains, [1] * len(gains), budget)
    assert left == budget - sum(steps) >= 0


@settings(max_examples=150, deadline=None)
@given(SITES, st.lists(st.integers(1, 9), min_size=4, max_size=4), st.integers(0, 40))
def test_with_other_prices_less_than_a_step_is_lost(gains, prices, budget):
    prices = prices[: len(gains)]
    steps, left = water_fill(tensors(gains), prices, budget)
    spent = paid(prices, steps)
    assert left == budget - spent >= 0
    bought = [(g[n - 1], p) for g, n, p in zip(gains, steps, prices, strict=True) if n]
    refused = [(g[n], p) for g, n, p in zip(gains, steps, prices, strict=True) if n < len(g)]
    # Less is lost than one step that did not fit would have gained ...
    one_step = max((g for g, _ in refused), default=0)
    assert best(gains, prices, budget) <= gained(gains, steps) + one_step
    # ... and nothing where the budget went to the best steps without a remainder.
    dearest = max((g / p for g, p in refused), default=0)
    if left == 0 and all(g / p >= dearest for g, p in bought):
        assert gained(gains, steps) == best(gains, prices, budget)


@settings(max_examples=150, deadline=None)
@given(
    SITES,
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
    st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
def test_more_budget_never_gains_less(gains, prices, budgets):
    prices = prices[: len(gains)]
    less, more = (
        gained(gains, water_fill(tensors(gains), prices, budget)[0]) for budget in sorted(budgets)
    )
    assert less <= more


def test_steps_that_gain_nothing_are_not_bought():
    assert water_fill(tensors([[0, 0], [3, 0]]), [1, 1], 4) == ([0, 1], 3)


def test_a_step_too_dear_does_not_stop_cheaper_ones():
    assert water_fill(tensors([[9], [2, 1]]), [5, 1], 3) == ([0, 2], 1)


@pytest.mark.parametrize("gains", [[1, 2], [-1], [float("nan")], [float("inf")]])
def test_gains_that_water_filling_cannot_take(gains):
    with pytest.raises(NumericalError, match="site number 1"):
        water_fill(tensors([[1], gains]), [1, 1], 2)
