"""What may follow or precede GPTQ's own sweep, against the plainest computation of the same."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dirotq.kernels.formats.lm4 import CODES
from dirotq.kernels.formats.quantize_weight import (
    codes_on_grid,
    dequantize_weight,
    nearest_codes,
    weight_scales,
    weight_steps,
)
from dirotq.kernels.gptq import best_codes, gptq, hessian_error, reference
from dirotq.kernels.gptq.refine import conditional_order, descend

N, K, DAMPING = 6, 32, 0.01


def correlated(seed: int, tokens: int) -> Tensor:
    """Second moment of ``tokens`` correlated rows, float64; singular if they are few."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator, dtype=torch.float64)
    mix *= torch.logspace(0, -2, K, dtype=torch.float64)[:, None]
    x = torch.randn(tokens, K, generator=generator, dtype=torch.float64) @ mix
    return x.T @ x / tokens


def damped(s: Tensor) -> Tensor:
    return s + DAMPING * s.diagonal().mean() * torch.eye(K, dtype=s.dtype)


def weights(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed + 1), dtype=dtype)


def step_of(w: Tensor, groups: int, element: str, factor: float = 1.0) -> Tensor:
    scale = weight_scales(w, groups, clip=False, element=element)
    return weight_steps((scale.float() * factor).to(torch.bfloat16), None, element)


def loss(w: Tensor, codes: Tensor, step: Tensor, s: Tensor) -> Tensor:
    return hessian_error(dequantize_weight(codes, step, torch.float64) - w.double(), s)


def sweep(element: str):
    return lambda *given: reference.sweep(*given, element=element)


def one_column_at_a_time(w, h, step, codes, rounds, element) -> Tensor:
    """Each column's best code from its own quadratic, all errors computed afresh."""
    codes = codes.clone()
    steps = step.double().repeat_interleave(K // step.shape[1], 1)
    for _, k in itertools.product(range(rounds), range(K)):
        error = w - codes * steps
        error[:, k] = 0
        wanted = w[:, k] + error @ h[:, k] / h[k, k]
        codes[:, k] = nearest_codes(wanted, steps[:, k], element).to(torch.int8)
    return codes


CASES = st.tuples(
    st.integers(0, 10_000), st.integers(1, 80), st.sampled_from([1, 4]),
    st.sampled_from(["int4", "lm4"]),
)  # fmt: skip


@given(CASES, st.sampled_from([1, 5, 12, 40]))
def test_no_round_of_the_descent_raises_a_row_s_loss(case, block):
    seed, tokens, groups, element = case
    w, h = weights(seed), damped(correlated(seed, tokens))
    step = step_of(w, groups, element)
    codes, before = codes_on_grid(w, step, element), torch.inf
    for _ in range(3):
        now = loss(w, codes, step, h)
        assert (now <= before * (1 + 1e-12)).all()
        codes = descend(w, h, step, codes, rounds=1, sweep=sweep(element), block=block)
        before = now


@pytest.mark.parametrize("element", ["int4", "lm4"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("block", [1, 7, 8, 32, 100])
def test_blocks_are_one_column_at_a_time(block, groups, element):
    w, h = weights(3), damped(correlated(3, 200))
    step = step_of(w, groups, element)
    codes = codes_on_grid(w, step, element)
    want = one_column_at_a_time(w, h, step, codes, 2, element)
    before = codes.clone()
    found = descend(w, h, step, codes, rounds=2, sweep=sweep(element), block=block)
    assert torch.equal(found, want)
    assert not torch.equal(found, codes)
    assert torch.equal(codes, before)


def test_where_the_descent_ends_no_other_code_loses_less():
    w, h = weights(4), damped(correlated(4, 200))
    step = step_of(w, 1, "lm4")
    codes = codes_on_grid(w, step, "lm4")
    codes = descend(w, h, step, codes, rounds=50, sweep=sweep("lm4"), block=8)
    least = loss(w, codes, step, h)
    for k, code in itertools.product(range(K), [*CODES, *(-c for c in CODES)]):
        other = codes.clone()
        other[:, k] = code
        assert (loss(w, other, step, h) >= least * (1 - 1e-12)).all()


def greedy(h: Tensor) -> list[int]:
    """The order from its definition: variances given a set of columns, by solving."""
    chosen: list[int] = []
    while len(chosen) < len(h):
        rest = [k for k in range(len(h)) if k not in chosen]
        given = h[chosen][:, chosen]
        across = h[chosen][:, rest]
        variance = h.diagonal()[rest] - (across * torch.linalg.solve(given, across)).sum(0)
        chosen.append(rest[int(variance.argmin())])
    return chosen[::-1]


@pytest.mark.parametrize("tokens", [200, 12])
@pytest.mark.parametrize("block", [1, 5, 32, 128])
def test_the_last_column_has_the_least_variance_given_those_after_it(block, tokens):
    s = correlated(5, tokens)
    before = s.clone()
    assert conditional_order(s, DAMPING, block).tolist() == greedy(damped(s))
    assert torch.equal(s, before)


def test_the_order_evens_out_what_errors_cost():
    s = correlated(6, 500)

    def cost(order: Tensor) -> Tensor:
        backwards = order.flip(0)
        return torch.linalg.cholesky(damped(s)[backwards][:, backwards]).diagonal().square().sum()

    ours = cost(conditional_order(s, DAMPING, 8))
    assert ours < cost(s.diagonal().argsort(descending=True))
    assert ours < cost(torch.arange(K))


@pytest.mark.parametrize("entry", [-30.0, 0.0])
def test_a_moment_that_is_not_positive_still_has_an_order(entry):
    s = correlated(7, 200)
    s[5, 5] = entry
    assert conditional_order(s, DAMPING, 8).sort().values.tolist() == list(range(K))


@given(CASES)
def test_one_grid_and_no_round_is_gptq(case):
    seed, tokens, groups, element = case
    w, s = weights(seed, torch.float32), correlated(seed, tokens)
    step = step_of(w, groups, element)
    want, want_counts = gptq(w, s, step, damping=DAMPING, element=element)
    codes, taken, counts = best_codes(w, s, [step], damping=DAMPING, element=element)
    assert torch.equal(codes, want)
    assert counts == want_counts
    assert not taken.any()


@pytest.mark.parametrize("element", ["int4", "lm4"])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_row_takes_the_grid_that_loses_least(groups, element):
    w, s = weights(9), correlated(9, 200)
    grids = [step_of(w, groups, element, factor) for factor in (1.0, 0.9, 1.1)]
    alone = [gptq(w, s, grid, damping=DAMPING, element=element) for grid in grids]
    losses = torch.stack([loss(w, c, g, damped(s)) for (c, _), g in zip(alone, grids)])
    codes, taken, counts = best_codes(w, s, grids, damping=DAMPING, element=element)
    assert not any(count["nearest"] for count in (counts, *(count for _, count in alone)))
    assert torch.equal(taken, losses.argmin(0))
    assert len(taken.unique()) > 1
    assert torch.equal(codes, torch.stack([c for c, _ in alone])[taken, torch.arange(N)])


def test_a_row_that_keeps_nearest_rounding_keeps_the_first_grid():
    w, s = weights(9), torch.diag(torch.rand(K, dtype=torch.float64) + 0.1)
    grids = [step_of(w, 1, "lm4", factor) for factor in (1.0, 2.0)]
    codes, taken, counts = best_codes(w, s, grids, damping=DAMPING, element="lm4")
    assert torch.equal(codes, codes_on_grid(w, grids[0], "lm4"))
    assert counts == {"escalations": 0, "nearest": N}
    assert not taken.any()


@given(CASES, st.sampled_from(["variance", "conditional"]), st.integers(0, 2))
def test_refined_codes_are_never_worse_than_nearest_either(case, order, descent):
    seed, tokens, groups, element = case
    w, s = weights(seed, torch.float32), correlated(seed, tokens)
    grids = [step_of(w, groups, element, factor) for factor in (1.0, 0.9, 1.1)]
    codes, taken, counts = best_codes(
        w, s, grids, damping=DAMPING, order=order, descent=descent, element=element
    )
    step = torch.stack(grids)[taken, torch.arange(N)]
    nearest = codes_on_grid(w, grids[0], element)
    slack = 1e-5 * hessian_error(w.double(), s)  # compared in float32
    assert (loss(w, codes, step, s) <= loss(w, nearest, grids[0], s) + slack).all()
    assert 0 <= counts["nearest"] <= N


@pytest.mark.parametrize(
    ("refinement", "count"), [({"descent": 4}, 1), ({"order": "conditional"}, 1), ({}, 3)]
)
def test_each_refinement_gains(refinement, count):
    """Over 20 draws; singly a row may lose."""
    ours = theirs = 0.0
    for seed in range(20):
        w, s = weights(seed), correlated(seed, 500)
        grids = [step_of(w, 1, "lm4", factor) for factor in (1.0, 0.95, 1.05)[:count]]
        plain, _ = gptq(w, s, grids[0], damping=DAMPING, element="lm4")
        codes, taken, _ = best_codes(w, s, grids, damping=DAMPING, element="lm4", **refinement)
        step = torch.stack(grids)[taken, torch.arange(N)]
        ours += float(loss(w, codes, step, damped(s)).sum())
        theirs += float(loss(w, plain, grids[0], damped(s)).sum())
    assert ours < 0.97 * theirs
