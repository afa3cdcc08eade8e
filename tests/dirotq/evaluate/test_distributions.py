import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq.evaluate.distributions import frechet_distance, kernel_distance


def normal(count, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, generator=generator, dtype=torch.float64)


def whitened(count, channels, seed=0):
    """Samples whose mean is exactly 0 and covariance exactly 1."""
    x = normal(count, channels, seed)
    x -= x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1))).T


def test_frechet_distance_of_two_normals_by_hand():
    """Diagonal covariances: |m|² + sum (s1 - s2)²."""
    scales = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    a, b = whitened(50, 3), whitened(60, 3, seed=1) * scales + torch.tensor([3.0, 0, 4.0])
    assert frechet_distance(a, b) == pytest.approx(25 + 0 + 1 + 0.25, rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99))
def test_frechet_distance_is_symmetric_and_turns_with_the_axes(seed):
    a, b = normal(40, 4, seed), normal(40, 4, seed + 1) * 1.5 + 0.3
    turn = torch.linalg.qr(normal(4, 4, seed + 2))[0]
    want = frechet_distance(a, b)
    assert want > 0
    assert frechet_distance(b, a) == pytest.approx(want, rel=1e-6)
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(want, rel=1e-6)


def test_equal_sets_are_at_no_distance():
    a = normal(20, 3)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_fewer_images_than_features_still_have_a_distance():
    a, b = normal(8, 32), normal(8, 32, seed=1)
    assert 0 < frechet_distance(a, b) < 1e3


def test_kernel_distance_is_the_u_statistic_of_pairs():
    a, b = normal(7, 3), normal(7, 3, seed=1)
    kernel = lambda x, y: (float(x @ y) / 3 + 1) ** 3  # noqa: E731

    def apart(x, y):
        return sum(kernel(p, q) for i, p in enumerate(x) for j, q in enumerate(y) if i != j) / 42

    want = apart(a, a) + apart(b, b) - 2 * apart(a, b)
    assert kernel_distance(a, b) == pytest.approx(want, rel=1e-9)
    assert kernel_distance(b, a) == pytest.approx(want, rel=1e-9)


def test_paired_sets_that_are_nearly_equal_are_at_nearly_no_distance():
    """Same prompts and noise: the estimate for independent samples would be far below zero here."""
    a = normal(8, 16) * 3
    assert kernel_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert abs(kernel_distance(a, a + 1e-4 * normal(8, 16, 1))) < 1e-2


def test_kernel_distance_is_unbiased_around_zero_and_sees_a_shift():
    same = [kernel_distance(normal(20, 4, 2 * s), normal(20, 4, 2 * s + 1)) for s in range(60)]
    spread = torch.tensor(same).std() / 60**0.5
    assert abs(sum(same) / 60) < 4 * spread
    assert min(same) < 0  # as an unbiased estimate of zero is half of the time
    assert kernel_distance(normal(20, 4), normal(20, 4, 1) + 2) > max(same)


def test_neither_draws_from_torch():
    a, b = normal(9, 3), normal(9, 3, seed=1)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append((frechet_distance(a, b), kernel_distance(a, b)))
    assert results[0] == pytest.approx(results[1], rel=1e-12)


def test_too_few_images():
    with pytest.raises(ValueError, match="needs two of each, not 1"):
        frechet_distance(normal(1, 3), normal(5, 3))
    with pytest.raises(ValueError, match="needs two of each"):
        kernel_distance(normal(5, 3), normal(1, 3))
    with pytest.raises(ValueError, match="equally many"):
        kernel_distance(normal(5, 3), normal(4, 3))
