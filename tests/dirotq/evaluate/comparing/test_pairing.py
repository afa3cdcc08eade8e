import dataclasses

import numpy as np
import pytest
from measured_runs import scores

from dirotq.evaluate.comparing import pairing
from dirotq.evaluate.comparing.pairing import compared, resampled_means
from dirotq.evaluate.comparing.runs import Run
from dirotq.evaluate.statistics import Interval, difference_interval, mean_interval


def run(psnr: list[float], first: int = 0) -> Run:
    return Run(
        name="validate/x", model="m", method="d", date="", source="s", settings={},
        prompts=tuple((f"prompt {i}", i) for i in range(first, first + len(psnr))),
        psnr_N=tuple(psnr), psnr=mean_interval(psnr), ssim=Interval(1, 1, 1),
        bits=4.0, bytes=1, original=2, seconds=1.0, device="H200", level="", verdict="",
    )  # fmt: skip


def ends(interval: Interval) -> tuple[float, float, float]:
    return dataclasses.astuple(interval)


def test_pairs_are_those_of_the_tables():
    """The same draws and so the same interval as `validate` and docs/quality.md have."""
    a, b, c = (scores(mean, seed) for seed, mean in enumerate((40.0, 39.9, 38.0)))
    found = compared([run(a), run(b), run(c)])
    assert [(pair.first, pair.second) for pair in found] == [(0, 1), (0, 2), (1, 2)]
    for pair, (x, y) in zip(found, ((a, b), (a, c), (b, c)), strict=True):
        assert ends(pair.apart) == pytest.approx(ends(difference_interval(x, y)), abs=1e-9)
        assert pair.closer == sum(p > q for p, q in zip(x, y, strict=True))


def test_pairing_sees_what_means_alone_do_not():
    a, b = scores(40.0, 0), scores(39.5, 1)
    [paired] = compared([run(a), run(b)])
    [unpaired] = compared([run(a), run(b, first=100)])
    assert paired.apart.low > 0
    assert unpaired.apart.low < 0 < unpaired.apart.high
    assert unpaired.closer is None
    assert unpaired.apart.mean == pytest.approx(paired.apart.mean)


def test_unpaired_columns_vary_by_themselves():
    """Their variances add up, whatever draws both means come from."""
    values = scores(40.0, 0, count=64)
    [pair] = compared([run(values), run(values, first=100)])
    alone = mean_interval(values)
    width = pair.apart.high - pair.apart.low
    assert width == pytest.approx(2**0.5 * (alone.high - alone.low), rel=0.05)


@pytest.mark.parametrize("change", ["seed", "order", "fewer"])
def test_only_the_same_prompts_and_seeds_are_pairs(change):
    a = run(scores(40.0))
    prompts = {
        "seed": tuple((text, seed + 1) for text, seed in a.prompts),
        "order": a.prompts[::-1],
        "fewer": a.prompts[:-1],
    }[change]
    other = dataclasses.replace(a, prompts=prompts, psnr_N=a.psnr_N[: len(prompts)])
    assert [pair.closer for pair in compared([a, other])] == [None]


@pytest.mark.parametrize("count", [2, 3])
def test_more_runs_than_pairs_are_made_of(monkeypatch, count):
    monkeypatch.setattr(pairing, "MOST", 2)
    runs = [run(scores(40.0, seed)) for seed in range(count)]
    assert [(pair.first, pair.second) for pair in compared(runs)] == [(0, 1)]


def test_one_image_and_one_run():
    assert compared([run([40.0])]) == []
    [pair] = compared([run([40.0]), run([39.0])])
    assert ends(pair.apart) == (1.0, 1.0, 1.0)


def test_means_of_draws_in_several_parts(monkeypatch):
    x_NR = np.array([scores(40.0, 0), scores(39.0, 1)]).T
    whole = resampled_means(x_NR)
    monkeypatch.setattr(pairing, "CHUNK", 5000)
    np.testing.assert_allclose(resampled_means(x_NR), whole)
    assert whole.shape == (pairing.RESAMPLES, 2)
