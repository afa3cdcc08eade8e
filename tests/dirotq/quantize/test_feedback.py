import torch
from tiny_spec import tiny_spec

from dirotq.quantize.feedback import feedback
from dirotq.quantize.rotation import Rotation
from dirotq.quantize.spectrum import principal_basis

D, N, R = 64, 20, 8


def site(**changes) -> tuple[Rotation, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A rotation with float64-exact P, rows of x, their moment, and an error of the weights."""
    torch.manual_seed(0)
    x = torch.randn(500, D, dtype=torch.float64) * torch.logspace(0, -1, D)
    x = x @ torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    s = x.T @ x / 500
    vectors = principal_basis(s)[1]
    rotation = Rotation.cut(
        {"vectors": vectors, "duals": vectors}, tiny_spec(rank=R, block=16, **changes)
    )
    return rotation, x, s, 0.1 * torch.randn(N, D, dtype=torch.float64)


def test_eigenvectors_that_left_the_input_leave_nothing_to_feed_back():
    rotation, _, s, error = site()
    _, share = feedback(rotation, s, error)
    assert 0 <= share < 1e-4  # of bf16's rounding of P


def test_beside_the_whole_input_it_is_least_squares():
    rotation, x, s, error = site(branch="beside")
    change, share = feedback(rotation, s, error)
    z = x @ torch.block_diag(*[hadamard()] * (D // 16))
    c = x @ rotation.basis_DR.double()
    want = torch.linalg.lstsq(c, z @ error.T).solution.T
    torch.testing.assert_close(change, want, rtol=1e-4, atol=1e-6)
    before, after = (z @ error.T).square().sum(), (z @ error.T - c @ change.T).square().sum()
    torch.testing.assert_close(torch.tensor(share).double(), 1 - after / before, rtol=1e-4, atol=0)
    assert share > 0.2


def hadamard() -> torch.Tensor:
    from dirotq.kernels.formats.hadamard import hadamard_matrix

    return hadamard_matrix(16, torch.float64, torch.device("cpu"))
