import pytest
import torch
from torch import Tensor

from dirotq.errors import NumericalError
from dirotq.quantize.low_rank import LowRank, svd_branch, weighted_branch

D, N = 24, 40


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
