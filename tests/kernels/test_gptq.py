import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dirotq.kernels.formats.quantize_weight import (
    codes_on_grid,
    dequantize_weight,
    fp4_weight_scales,
    pack_codes,
    weight_scales,
    weight_steps,
)
from dirotq.kernels.gptq import FactorizationError, gptq, hessian_error, reference

N, K = 6, 32
DAMPING = 0.01


def correlated(seed: int, tokens: int, channels: int = K) -> Tensor:
    """Second moment of ``tokens`` correlated rows, float64; singular if they are few."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    mix *= torch.logspace(0, -2, channels, dtype=torch.float64)[:, None]
    x = torch.randn(tokens, channels, generator=generator, dtype=torch.float64) @ mix
    return x.T @ x / tokens


def weights(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(N, K, generator=generator, dtype=dtype)


def loss(w: Tensor, codes: Tensor, scale: Tensor, s: Tensor) -> Tensor:
    return hessian_error(dequantize_weight(codes, scale, torch.float64) - w.double(), s)


def one_column_at_a_time(w: Tensor, s: Tensor, scale: Tensor) -> Tensor:
    """The textbook: after each column the optimal update of all later ones, by a fresh inverse."""
    order = s.diagonal().argsort(descending=True, stable=True)
    hessian = s[order][:, order]
    hessian = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(s), dtype=s.dtype)
    w, codes = w[:, order].double(), torch.zeros(w.shape, dtype=torch.int8)
    step = scale.double().repeat_interleave(w.shape[1] // scale.shape[1], 1)[:, order]
    for k in range(w.shape[1]):
        q = (w[:, k] / step[:, k]).round().clamp(-7, 7)
        inverse = torch.linalg.inv(hessian[k:, k:])
        error = (w[:, k] - q * step[:, k]) / inverse[0, 0]
        w[:, k:] -= torch.outer(error, inverse[0])
        codes[:, order[k]] = q.to(torch.int8)
    return codes


def test_hessian_error_is_the_expected_squared_output_error():
    x, e = torch.randn(100, K, dtype=torch.float64), torch.randn(N, K, dtype=torch.float64)
    torch.testing.assert_close(hessian_error(e, x.T @ x / 100), (x @ e.T).square().mean(0))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("tokens", [500, 12])
def test_matches_the_textbook(groups, tokens):
    w, s = weights(0, torch.float64), correlated(0, tokens)
    scale = weight_scales(w, groups, clip=False)
    codes, counts = gptq(w, s, scale, damping=DAMPING)
    want = one_column_at_a_time(w, s, scale)
    ours = (loss(w, want, scale, s) < loss(w, codes_on_grid(w, scale), scale, s)).nonzero()[:, 0]
    assert len(ours) >= N - counts["nearest"]
    assert len(ours) > N // 2
    assert torch.equal(codes[ours], want[ours])


def classic(w: Tensor, s: Tensor, scale: Tensor, block: int) -> Tensor:
    """GPTQ as published: the upper Cholesky factor of the inverse, lazy updates of later blocks."""
    order = s.diagonal().argsort(descending=True, stable=True)
    damped = s[order][:, order] + DAMPING * s.diagonal().mean() * torch.eye(len(s), dtype=s.dtype)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    w, codes = w[:, order].clone(), torch.zeros(w.shape, dtype=torch.int8)
    step = scale.to(w.dtype).repeat_interleave(w.shape[1] // scale.shape[1], 1)[:, order]
    for start in range(0, w.shape[1], block):
        stop, errors = min(start + block, w.shape[1]), []
        for k in range(start, stop):
            q = (w[:, k] / step[:, k]).round().clamp(-7, 7)
            errors.append((w[:, k] - q * step[:, k]) / upper[k, k])
            w[:, k + 1 : stop] -= torch.outer(errors[-1], upper[k, k + 1 : stop])
            codes[:, order[k]] = q.to(torch.int8)
        w[:, stop:] -= torch.stack(errors, 1) @ upper[start:stop, stop:]
    return codes


@given(st.integers(0, 10_000), st.integers(1, 80), st.sampled_from([1, 4]))
def test_is_classic_gptq(seed, tokens, groups):
    """One factor of S instead of one of its inverse: the same codes."""
    w, s = weights(seed, torch.float64), correlated(seed, tokens)
    scale = weight_scales(w, groups, clip=True, importance_K=s.diagonal())
    want = classic(w, s, scale, block=8)
    codes, counts = gptq(w, s, scale, damping=DAMPING)
    nearest = codes_on_grid(w, scale)
    kept = loss(w, nearest, scale, s) <= loss(w, want, scale, s)
    assert counts["nearest"] == kept.sum()
    assert torch.equal(codes, torch.where(kept[:, None], nearest, want))


def test_the_unit_factor_factors_the_damped_moment():
    s = correlated(11, 12)
    order = s.diagonal().argsort(descending=True, stable=True)
    f, _ = reference._unit_factor(s, order, DAMPING, torch.float64)
    damped = s[order][:, order] + DAMPING * s.diagonal().mean() * torch.eye(K, dtype=s.dtype)
    assert torch.equal(f.triu(), f)
    assert (f.diagonal() == 1).all()
    middle = torch.linalg.solve(f, torch.linalg.solve(f, damped).T)
    torch.testing.assert_close(middle, middle.diagonal().diag(), rtol=0, atol=1e-12)
    torch.testing.assert_close(f @ middle @ f.T, damped)


def test_a_sweep_rounds_what_earlier_errors_left():
    w = torch.tensor([[1.0, 1.0, 1.0], [0.25, 3.0, -11.0]])
    target = w + torch.tensor([0.0, 0.0, 1.5])  # what earlier blocks left to the third column
    f = torch.tensor([[1.0, 0.5, 1.0], [0.0, 1.0, -1.0], [0.0, 0.0, 1.0]])
    # Row 0, steps of 4: 1 -> 0, 1 + 0.5 -> 0, 2.5 + 1 - 1 -> 4. Row 1, steps of 1: 0.25 -> 0,
    # 3 + 0.125 -> 3, -9.5 + 0.25 - 0 -> -7, the last code. Errors count from the weights.
    codes, error = reference.sweep(w, target, torch.tensor([[4.0], [1.0]]), f)
    assert codes.tolist() == [[0, 0, 1], [0, 3, -7]]
    assert error.tolist() == [[1.0, 1.0, -3.0], [0.25, 0.0, -4.0]]
    zero, left = reference.sweep(w, target, torch.zeros(2, 1), f)
    assert not zero.any()
    assert torch.equal(left, w)


def test_rows_in_parts_change_nothing(monkeypatch):
    w, s = weights(12, torch.float64), correlated(12, 200)
    scale, error = weight_scales(w, 4, clip=False), torch.randn(7, K, dtype=torch.float64)
    whole = gptq(w, s, scale, damping=DAMPING), hessian_error(error, s)
    monkeypatch.setattr(reference, "CHUNK", 2 * K + 1)
    parts = gptq(w, s, scale, damping=DAMPING), hessian_error(error, s)
    assert torch.equal(whole[0][0], parts[0][0])
    assert whole[0][1] == parts[0][1]
    torch.testing.assert_close(whole[1], parts[1])


class Squares(TorchDispatchMode):
    """The most float64 [K, K] that were ever alive at a time, of those made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref] = []
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
                self.made += [weakref.ref(tensor)] if tensor.shape == (K, K) else []
        alive = {tensor.data_ptr() for made in self.made if (tensor := made()) is not None}
        self.most = max(self.most, len(alive))
        return made


@pytest.mark.parametrize("negative", [0.0, 0.5])
def test_two_large_matrices_are_alive_at_most(negative):
    """At 15,360 columns each takes 1.9 GB; failed factors are gone before the next one comes."""
    w, s = weights(14), correlated(14, 200)
    s[5, 5] -= negative
    scale = weight_scales(w, 1, clip=False)
    with Squares() as squares:
        _, counts = gptq(w, s, scale, damping=DAMPING)
    assert bool(counts["escalations"]) == bool(negative)
    assert squares.most == 2


def test_products_are_float32_products(monkeypatch):
    seen = []
    add = torch.addmm
    monkeypatch.setattr(
        torch, "addmm", lambda *a: seen.append(torch.get_float32_matmul_precision()) or add(*a)
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        w = weights(13)
        gptq(w, correlated(13, 200), weight_scales(w, 1, clip=False), damping=DAMPING)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"]


@given(st.integers(0, 10_000), st.integers(1, 80), st.sampled_from([1, 4]))
def test_never_worse_than_nearest_even_when_singular(seed, tokens, groups):
    w, s = weights(seed), correlated(seed, tokens)
    scale = weight_scales(w, groups, clip=True, importance_K=s.diagonal())
    codes, counts = gptq(w, s, scale, damping=DAMPING)
    assert codes.dtype == torch.int8
    assert codes.abs().max() <= 7
    assert counts["escalations"] == 0
    nearest = codes_on_grid(w, scale)
    # gptq compares in float32: allow for its rounding of both sides.
    slack = 1e-5 * hessian_error(w.double(), s)
    assert (loss(w, codes, scale, s) <= loss(w, nearest, scale, s) + slack).all()


@given(st.integers(0, 10_000), st.integers(1, 80), st.sampled_from(["nvfp4", "mxfp4"]))
def test_fp4_is_never_worse_than_nearest_either(seed, tokens, name):
    w, s = weights(seed), correlated(seed, tokens)
    step = weight_steps(*fp4_weight_scales(w, name, clip=True, importance_K=s.diagonal()))
    codes, _ = gptq(w, s, step, damping=DAMPING, element="e2m1")
    pack_codes(codes, "e2m1")  # refuses what is no code
    nearest = codes_on_grid(w, step, "e2m1")
    slack = 1e-5 * hessian_error(w.double(), s)
    assert (loss(w, codes, step, s) <= loss(w, nearest, step, s) + slack).all()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_fp4_gains_where_channels_are_correlated(name):
    w, s = weights(5), correlated(5, 24)
    step = weight_steps(*fp4_weight_scales(w, name, clip=False))
    codes, counts = gptq(w, s, step, damping=DAMPING, element="e2m1")
    nearest = codes_on_grid(w, step, "e2m1")
    assert loss(w, codes, step, s).sum() < 0.6 * loss(w, nearest, step, s).sum()
    assert counts["nearest"] < N


@given(st.integers(0, 10_000), st.integers(1, 80), st.sampled_from([1, 4]))
def test_levels_are_never_worse_than_nearest_either(seed, tokens, groups):
    w, s = weights(seed), correlated(seed, tokens)
    scale = weight_scales(w, groups, clip=True, importance_K=s.diagonal(), element="lm4")
    step = weight_steps(scale, None, "lm4")
    codes, _ = gptq(w, s, step, damping=DAMPING, element="lm4")
    pack_codes(codes, "lm4")  # refuses what is no code
    nearest = codes_on_grid(w, step, "lm4")
    slack = 1e-5 * hessian_error(w.double(), s)
    assert (loss(w, codes, step, s) <= loss(w, nearest, step, s) + slack).all()


def test_a_sweep_over_levels():
    w = torch.tensor([[10.0, 0.5, 70.0]])
    f = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    # 10 -> 13; 0.5 - 3 / 2 = -1 -> -4; 70 + 4.5 -> 72.
    codes, error = reference.sweep(w, w, torch.ones(1, 1), f, element="lm4")
    assert codes.tolist() == [[13, -4, 72]]
    torch.testing.assert_close(error, torch.tensor([[-3.0, 4.5, -2.0]]))


def test_an_fp4_sweep_rounds_to_what_e2m1_has():
    w = torch.tensor([[5.0, 0.5, 6.9]])
    f = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    # Steps of 1: 5 lies between 4 and 6, the even mantissa is 4's; 0.5 + 1 / 2 -> 1;
    # 6.9 - 0.5 -> 6.
    codes, error = reference.sweep(w, w, torch.ones(1, 1), f, element="e2m1")
    assert codes.tolist() == [[4, 1, 6]]
    torch.testing.assert_close(error, torch.tensor([[1.0, -0.5, 0.9]]))


def test_much_better_than_nearest_where_channels_are_correlated():
    w, s = weights(5), correlated(5, 24)
    scale = weight_scales(w, 1, clip=False)
    codes, counts = gptq(w, s, scale, damping=DAMPING)
    ours, nearest = (loss(w, q, scale, s).sum() for q in (codes, codes_on_grid(w, scale)))
    assert ours < nearest / 2
    assert counts["nearest"] < N


def test_uncorrelated_channels_are_rounded_to_nearest():
    w = weights(1)
    s = torch.diag(torch.rand(K, dtype=torch.float64) + 0.1)
    scale = weight_scales(w, 4, clip=False)
    codes, counts = gptq(w, s, scale, damping=DAMPING)
    assert torch.equal(codes, codes_on_grid(w, scale))
    assert counts == {"escalations": 0, "nearest": N}


def test_channels_that_saw_nothing_keep_their_weights():
    w, s = weights(2), correlated(2, 200)
    dead = [3, 17, 18]
    s[dead] = 0.0
    s[:, dead] = 0.0
    scale = weight_scales(w, 1, clip=False)
    codes, _ = gptq(w, s, scale, damping=DAMPING)
    assert torch.equal(codes[:, dead], codes_on_grid(w, scale)[:, dead])
    assert not torch.equal(codes, codes_on_grid(w, scale))


@pytest.mark.parametrize("groups", [1, 4])
def test_the_order_of_channels_does_not_matter(groups):
    w, s = weights(3), correlated(3, 200)
    scale = weight_scales(w, groups, clip=False)
    codes, _ = gptq(w, s, scale, damping=DAMPING)
    if groups == 1:
        shuffled, shuffled_scale = torch.randperm(K), scale
    else:  # whole groups move, with their scales
        groups_moved = torch.tensor([2, 0, 3, 1])
        shuffled = torch.arange(K).unflatten(0, (4, -1))[groups_moved].flatten()
        shuffled_scale = scale[:, groups_moved]
    again, _ = gptq(w[:, shuffled], s[shuffled][:, shuffled], shuffled_scale, damping=DAMPING)
    assert torch.equal(again, codes[:, shuffled])


def test_rows_do_not_see_each_other():
    w, s = weights(4, torch.float64), correlated(4, 200)
    scale = weight_scales(w, 1, clip=False)
    codes, _ = gptq(w, s, scale, damping=DAMPING)
    alone, _ = gptq(w[2:3], s, scale[2:3], damping=DAMPING)
    assert torch.equal(alone, codes[2:3])


@pytest.mark.parametrize("block", [1, 5, 16])
def test_lazy_blocks_change_nothing(block, monkeypatch):
    w, s = weights(6, torch.float64), correlated(6, 200)
    scale = weight_scales(w, 1, clip=False)
    whole, _ = gptq(w, s, scale, damping=DAMPING)
    monkeypatch.setattr(reference, "BLOCK", block)
    blocked, _ = gptq(w, s, scale, damping=DAMPING)
    assert torch.equal(whole, blocked)


def test_zero_rows_stay_zero():
    w, s = weights(7), correlated(7, 200)
    w[1] = 0.0
    codes, _ = gptq(w, s, weight_scales(w, 1, clip=False), damping=DAMPING)
    assert not codes[1].any()
    assert codes[0].any()


@pytest.mark.parametrize(("negative", "escalations"), [(1e-3, 0), (0.05, 1), (0.5, 2), (2.0, 3)])
def test_damping_grows_tenfold_and_is_counted(negative, escalations):
    s = torch.eye(K, dtype=torch.float64)
    s[5, 5] = -negative
    w = weights(8)
    scale = weight_scales(w, 1, clip=False)
    assert gptq(w, s, scale, damping=DAMPING)[1]["escalations"] == escalations


@pytest.mark.parametrize("entry", [-30.0, float("nan")])
def test_escalation_is_bounded(entry):
    s = 4 * torch.eye(K, dtype=torch.float64)
    s[5, 5] = entry
    w = weights(9)
    with pytest.raises(FactorizationError, match=r"32 channels.*even with damping 10"):
        gptq(w, s, weight_scales(w, 1, clip=False), damping=DAMPING)


def test_a_site_without_any_signal_is_an_error():
    w = weights(10)
    with pytest.raises(FactorizationError, match="mean diagonal 0"):
        gptq(
            w, torch.zeros(K, K, dtype=torch.float64), weight_scales(w, 1, clip=False), damping=0.1
        )
