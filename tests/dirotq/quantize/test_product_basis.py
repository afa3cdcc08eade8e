import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq.errors import NumericalError
from dirotq.quantize.product_basis import STEP, product_basis
from dirotq.quantize.spectrum import principal_basis

D, N = 48, 96


def site(seed: int = 0, dim: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and weights that have leading directions of their own, float32."""
    generator = torch.Generator().manual_seed(seed)

    def turned(decay: float) -> torch.Tensor:
        turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
        return turn * torch.logspace(0, -decay, dim)

    x = torch.randn(400, dim, generator=generator) @ turned(1.5).mT
    w = torch.randn(N, dim, generator=generator) @ turned(1.0).mT
    return x.mT @ x / len(x), w


def product(s: torch.Tensor, w: torch.Tensor, vectors: torch.Tensor) -> float:
    """Energy of x times energy of W without these directions."""
    vectors = vectors.double()
    rest = torch.eye(len(s), dtype=torch.float64) - vectors @ vectors.mT
    return float((rest @ s.double() @ rest).trace() * (w.double() @ rest).square().sum())


@pytest.mark.parametrize("leading", [8, 12, 16, D, None])
def test_directions_are_orthonormal_and_have_their_energies(leading):
    s, w = site()
    energies, vectors = product_basis(s, w, leading)
    count = leading or D
    assert energies.dtype == vectors.dtype == torch.float64
    assert energies.shape == (count,)
    assert vectors.shape == (D, count)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(count).double(), rtol=0, atol=1e-9)
    expected = (vectors * (s.double() @ vectors)).sum(0)
    torch.testing.assert_close(energies, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("rank", [8, 16])
def test_the_product_is_less_than_of_leading_and_of_other_directions(rank):
    s, w = site()
    ours = product(s, w, product_basis(s, w, 16)[1][:, -rank:])
    of_inputs = product(s, w, principal_basis(s, rank)[1])
    of_weights = product(s, w, principal_basis(w.mT @ w, rank)[1])
    assert ours < 0.97 * min(of_inputs, of_weights)


def test_the_first_step_is_a_minimum():
    s, w = site()
    vectors = product_basis(s, w, STEP)[1]
    least = product(s, w, vectors)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        moved = vectors + 0.03 * torch.randn(D, STEP, generator=generator, dtype=torch.float64)
        assert product(s, w, torch.linalg.qr(moved).Q) > least


def test_ranks_are_nested():
    """More directions change nothing of the first."""
    s, w = site()
    few, many = product_basis(s, w, 24)[1], product_basis(s, w)[1][:, -24:]
    for rank in (8, 16, 24):
        a, b = few[:, -rank:], many[:, -rank:]
        torch.testing.assert_close(a @ a.mT, b @ b.mT, rtol=0, atol=1e-9)


@pytest.mark.parametrize("outputs", [40, 300])  # W and WᵀW are what is multiplied
def test_each_step_leads_the_sum_of_what_is_left(outputs, monkeypatch):
    """Without a look ahead the iteration ends at Eq. 15's fixed point, by a dense decomposition."""
    monkeypatch.setattr("dirotq.quantize.product_basis.AHEAD", 0)
    s, _ = site(dim=160)
    w = torch.randn(outputs, 160, generator=torch.Generator().manual_seed(5))
    vectors = product_basis(s, w, 32)[1]
    s, gram = s.double(), w.double().mT @ w.double()
    for rank in (8, 16, 24, 32):
        found, before = vectors[:, -rank:], vectors[:, len(vectors[0]) - rank + STEP :]
        rest, free = (torch.eye(160).double() - p @ p.mT for p in (found, before))
        weighed = sum(m / (rest @ m).trace() for m in (s, gram))
        most = torch.linalg.eigvalsh(free @ weighed @ free)[-STEP:].sum()
        assert float((found[:, :STEP] * (weighed @ found[:, :STEP])).sum()) > 0.999 * float(most)


def test_weights_alike_in_all_directions_leave_the_leading_ones_of_the_inputs():
    s, _ = site()
    ours = product_basis(s, torch.eye(D), 8)[1]
    theirs = principal_basis(s, 8)[1]
    torch.testing.assert_close(ours @ ours.mT, theirs @ theirs.mT, rtol=0, atol=1e-4)


def test_inputs_of_fewer_directions_than_are_kept():
    _, w = site()
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(2))
    energies, vectors = product_basis(x.mT @ x / 4, w, 24)
    assert bool(vectors.isfinite().all())
    held = float(energies[-8:].sum() / energies.sum())
    assert held > 0.99


def test_dead_inputs_are_refused_and_dead_weights_have_no_say():
    s, w = site()
    with pytest.raises(NumericalError, match="all activations are zero"):
        product_basis(0 * s, w, 8)
    for small in (0.0, 1e-24):  # squares of the latter are zero in float32
        for ours, theirs in zip(product_basis(s, small * w, 8), principal_basis(s, 8), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("leading", [8, None])
def test_what_is_not_finite_is_said_to_be_so(leading):
    s, w = site()
    for odd in (torch.nan, torch.inf):
        moment = s.index_put((torch.tensor([3]), torch.tensor([5])), torch.tensor(odd))
        with pytest.raises(NumericalError, match="the second moment holds NaN or infinity"):
            product_basis(moment, w, leading)
    for weights in (1e25 * w, w.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(odd))):
        with pytest.raises(NumericalError, match="the weights' Gram matrix holds NaN or infinity"):
            product_basis(s, weights, leading)
    with pytest.raises(NumericalError, match="not positive semi-definite"):
        product_basis(-s, w, leading)


@settings(max_examples=60)
@given(
    dim=st.integers(1, 40),
    rows=st.integers(1, 60),
    outputs=st.integers(1, 60),
    leading=st.none() | st.integers(1, 48),
    decays=st.tuples(st.floats(0, 3), st.floats(0, 3)),
    seed=st.integers(0, 999),
)
def test_any_site(dim, rows, outputs, leading, decays, seed):
    """Fewer calls or outputs than channels, one channel, ranks off the grid among them."""
    draw = torch.Generator().manual_seed(seed)
    s_decay, w_decay = (torch.logspace(0, -decay, dim) for decay in decays)
    x = torch.randn(rows, dim, generator=draw) * s_decay
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=draw)).Q
    w = (torch.randn(outputs, dim, generator=draw) * w_decay) @ turn
    s = x.mT @ x / rows
    energies, vectors = product_basis(s, w, leading)
    count = min(leading or dim, dim)
    assert (energies.dtype, vectors.dtype) == (torch.float64, torch.float64)
    assert (energies.shape, vectors.shape) == ((count,), (dim, count))
    assert bool((energies >= 0).all()) and float(energies.sum()) <= 1.0001 * float(s.trace())
    gram = vectors.mT @ vectors
    torch.testing.assert_close(gram, torch.eye(count).double(), rtol=0, atol=1e-10)
    whole = float(s.trace()) * float(w.double().square().sum())
    falling = [product(s, w, vectors[:, count - r :]) for r in range(0, count + 1, STEP)]
    assert all(b <= a + 1e-6 * whole for a, b in itertools.pairwise(falling))
    # The first step is chosen for itself; later ones are nested in it.
    if count >= STEP:
        principal = product(s, w, principal_basis(s, STEP)[1])
        assert falling[1] <= principal * (1 + 1e-6) + 1e-6 * whole
