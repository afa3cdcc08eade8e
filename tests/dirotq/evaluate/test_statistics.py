import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq.evaluate.statistics import difference_interval, mean_interval, proportion_interval

numbers = st.floats(-1e3, 1e3, allow_nan=False)
samples = st.lists(numbers, min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(samples)
def test_an_interval_holds_its_mean_and_stays_within_the_values(values):
    found = mean_interval(values)
    slack = 1e-9 + 1e-9 * max(map(abs, values))
    assert found.mean == pytest.approx(statistics.fmean(values), abs=slack)
    assert min(values) - slack <= found.low <= found.high <= max(values) + slack


@settings(max_examples=25, deadline=None)
@given(samples, numbers)
def test_shifting_the_values_shifts_the_interval(values, shift):
    here, there = mean_interval(values), mean_interval([v + shift for v in values])
    for a, b in ((here.low, there.low), (here.mean, there.mean), (here.high, there.high)):
        assert a + shift == pytest.approx(b, abs=1e-8)


@settings(max_examples=25, deadline=None)
@given(samples)
def test_equal_values_give_equal_intervals(values):
    assert mean_interval(values) == mean_interval(values)


def test_width_is_that_of_the_central_limit():
    rng = random.Random(1)
    values = [rng.gauss(3, 2) for _ in range(400)]
    found = mean_interval(values)
    want = 1.96 * statistics.pstdev(values) / math.sqrt(400)
    assert (found.high - found.low) / 2 == pytest.approx(want, rel=0.04)


def test_it_covers_the_truth_about_as_often_as_it_says():
    rng = random.Random(2)
    held = 0
    for _ in range(200):
        found = mean_interval([rng.gauss(0, 1) for _ in range(40)])
        held += found.low <= 0 <= found.high
    assert 0.88 <= held / 200 <= 0.99  # 95 %, less what the percentile method lacks at N = 40


def test_chunks_do_not_change_the_draws(monkeypatch):
    values = [float(i * i % 11) for i in range(9)]
    whole = mean_interval(values)
    monkeypatch.setattr("dirotq.evaluate.statistics.CHUNK", 9 * 70)
    assert mean_interval(values) == whole


def test_pairing_cancels_what_varies_from_prompt_to_prompt():
    rng = random.Random(3)
    prompts = [rng.gauss(40, 5) for _ in range(64)]
    better = [p + 0.5 + rng.gauss(0, 0.1) for p in prompts]
    found = difference_interval(better, prompts)
    assert 0.4 < found.low < found.mean < found.high < 0.6
    apart = mean_interval(better), mean_interval(prompts)
    assert apart[0].low < apart[1].high  # unpaired, the two could not be told apart


def test_a_difference_turns_its_sign():
    a, b = [1.0, 2.0, 4.0, 3.5], [0.5, 2.5, 1.0, 3.0]
    one, two = difference_interval(a, b), difference_interval(b, a)
    assert (one.mean, one.low, one.high) == pytest.approx((-two.mean, -two.high, -two.low))


def test_wilson_by_hand():
    # 8 of 10 at 95 %, z = 1.959964: (0.8 + 0.192073) / 1.384146 -+ ...
    found = proportion_interval(8, 10)
    assert (found.low, found.high) == pytest.approx((0.490162, 0.943318), abs=1e-6)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_proportions_stay_between_0_and_1_and_mirror(case):
    hits, total = case
    found, mirrored = proportion_interval(hits, total), proportion_interval(total - hits, total)
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert found.low < found.high  # even where all answers are alike
    assert found.low == pytest.approx(1 - mirrored.high, abs=1e-12)


@pytest.mark.parametrize("values", [[], [1.0, math.inf], [math.nan], [[1.0], [2.0]]])
def test_what_has_no_mean(values):
    with pytest.raises(ValueError, match="finite values"):
        mean_interval(values)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="not of one length"):
        difference_interval([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no proportion"):
        proportion_interval(3, 2)
