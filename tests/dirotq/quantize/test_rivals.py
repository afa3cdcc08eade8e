import pytest
import torch
from tiny_spec import tiny_spec
from torch import Tensor

from dirotq.errors import NumericalError
from dirotq.quantize.rivals import LowRank, best, simulated, smoothing, svd_branch, weighted_branch
from dirotq.quantize.rotation import Rotation

D, N = 24, 40
WIDE, OUT = 64, 48


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def weights() -> Tensor:
    return torch.randn(N, D, dtype=torch.float64) @ torch.diag(torch.logspace(0, -1, D).double())


def moments() -> Tensor:
    x = torch.randn(500, D, dtype=torch.float64) * torch.logspace(-1.5, 0, D).double()
    return x.T @ x / 500


def product(branch: LowRank, w: Tensor, rank: int) -> Tensor:
    """L = (W duals) vectorsᵀ at ``rank``."""
    return w @ branch.duals[:, -rank:] @ branch.vectors[:, -rank:].T


def test_svd_is_the_truncated_one():
    w = weights()
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    branch = svd_branch(w, None, None)
    for rank in (1, 5, D):
        want = u[:, :rank] * s[:rank] @ v[:rank]
        torch.testing.assert_close(product(branch, w, rank), want)
    torch.testing.assert_close(branch.variances.flip(0), s.square())
    assert branch.energy == pytest.approx(float(s.square().sum()))


def test_svd_of_smoothed_weights_is_that_of_the_product_with_their_inverse():
    w, m = weights(), torch.linspace(0.5, 3, D).double()
    branch = svd_branch(w, m, None)
    u, s, v = torch.linalg.svd(w / m, full_matrices=False)
    torch.testing.assert_close(product(branch, w, 4), (u[:, :4] * s[:4] @ v[:4]) * m)


def output_error(error: Tensor, s: Tensor) -> float:
    return float((error @ s * error).sum())


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_no_branch_errs_less_on_the_activations_than_the_weighted_one(rank):
    w, s = weights(), moments()
    ours = output_error(w - product(weighted_branch(w, s, 0.0, None), w, rank), s)
    svd = output_error(w - product(svd_branch(w, None, None), w, rank), s)
    assert ours < svd
    leading = torch.linalg.eigh(s).eigenvectors[:, -rank:]
    assert ours <= output_error(w - w @ leading @ leading.T, s) * (1 + 1e-9)
    branch = weighted_branch(w, s, 0.0, None)
    assert ours == pytest.approx(float(branch.variances[: D - rank].sum()), rel=1e-6)


def test_much_regularization_is_the_plain_svd():
    w, s = weights(), moments()
    got = product(weighted_branch(w, s, 1e7, None), w, 4)
    torch.testing.assert_close(got, product(svd_branch(w, None, None), w, 4), rtol=0, atol=1e-4)


def test_a_singular_moment_needs_regularization():
    with pytest.raises(NumericalError, match=r"regularization=0; raise it"):
        weighted_branch(weights(), torch.zeros(D, D), 0.0, None)
    s = torch.zeros(D, D).double()
    s[0, 0] = 1.0
    assert weighted_branch(weights(), s, 0.01, 4).vectors.shape == (D, 4)


def outliers() -> tuple[torch.Tensor, torch.Tensor]:
    """Activations with a few loud channels, and weights without."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, WIDE, generator=generator)
    x[:, :3] *= 30
    return x, torch.randn(OUT, WIDE, generator=generator)


def test_half_strength_levels_both_sides():
    x, w = outliers()
    m = smoothing(x.abs().amax(0), w, 0.5)
    ratio = (x * m).abs().amax(0) / (w / m).abs().amax(0)
    torch.testing.assert_close(ratio, ratio[0].expand(WIDE), rtol=1e-4, atol=0)
    torch.testing.assert_close(m.log().mean(), torch.zeros(()), rtol=0, atol=1e-5)


def test_full_strength_levels_the_activations():
    x, w = outliers()
    levelled = (x * smoothing(x.abs().amax(0), w, 1.0)).abs().amax(0)
    torch.testing.assert_close(levelled, levelled[0].expand(WIDE), rtol=1e-4, atol=0)


@pytest.mark.parametrize("leading", [8, None])
def test_dead_weights_have_a_branch_of_zeros(leading):
    w, s = torch.zeros(N, D), torch.eye(D)
    for found in (svd_branch(w, None, leading), weighted_branch(w, s, 0.03, leading)):
        assert found.energy == float(found.variances.sum()) == 0
        assert found.vectors.shape == found.duals.shape == (D, leading or D)
        assert not bool((w.double() @ found.duals).any()) and bool(found.vectors.isfinite().all())


def test_dead_channels_stay_finite():
    x, w = outliers()
    x[:, 5], w[:, 6] = 0, 0
    for alpha in (0.0, 0.5, 1.0):
        m = smoothing(x.abs().amax(0), w, alpha)
        assert m.isfinite().all()
        assert (m > 0).all()


def candidate(alpha: float | None) -> tuple[Rotation, float | None]:
    x, w = outliers()
    smooth = torch.ones(WIDE) if alpha is None else smoothing(x.abs().amax(0), w, alpha)
    spec = tiny_spec(smooth=True, weight_scale="group", act_scale="group", act_group=64)
    return Rotation.cut({"smooth": smooth}, spec), alpha


def test_the_best_candidate_is_the_one_that_errs_least():
    x, w = outliers()
    tried = [candidate(a) for a in (None, 0.25, 0.5, 1.0)]
    errors = {a: float((simulated(r, w, x, clip=False) - x @ w.T).norm()) for r, a in tried}
    chosen = best(tried, w, x, clip=False)
    assert errors[chosen] == min(errors.values())
    assert chosen is not None  # outliers are what smoothing is for
