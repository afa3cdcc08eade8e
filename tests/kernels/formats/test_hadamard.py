import pytest
import torch

from dirotq.kernels.formats.hadamard import block_hadamard, hadamard_block, hadamard_matrix

CPU = torch.device("cpu")
BLOCKS = [1, 2, 8, 64, 256]


def test_sylvesters_four_by_four():
    want = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert (2 * hadamard_matrix(4, torch.float64, CPU)).tolist() == want


@pytest.mark.parametrize("block", BLOCKS)
def test_orthogonal_symmetric_and_flat(block):
    h = hadamard_matrix(block, torch.float64, CPU)
    torch.testing.assert_close(h @ h.T, torch.eye(block, dtype=h.dtype), atol=1e-12, rtol=0)
    assert torch.equal(h, h.T)
    torch.testing.assert_close(h.abs(), torch.full_like(h, block**-0.5))


@pytest.mark.parametrize("block", [-4, 0, 3, 12, 96])
def test_only_powers_of_two(block):
    with pytest.raises(ValueError, match=f"power of two, got {block}"):
        hadamard_matrix(block, torch.float32, CPU)


@pytest.mark.parametrize(
    ("dim", "limit", "block"),
    [
        (3072, 256, 256),
        (12288, 128, 128),
        (2240, 256, 64),
        (5600, 256, 32),
        (96, 64, 32),
        (64, 1, 1),
        (81, 256, 1),
        (256, 300, 256),
    ],
)
def test_block_is_the_largest_power_of_two_that_divides(dim, limit, block):
    assert hadamard_block(dim, limit) == block


@pytest.mark.parametrize("block", BLOCKS)
def test_applying_it_twice_gives_x_back(block):
    x = torch.randn(3, 5, 512, dtype=torch.float64)
    y = block_hadamard(x, block)
    assert y.shape == x.shape
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(block_hadamard(y, block), x)


def test_an_impulse_spreads_over_its_own_block_only():
    x = torch.zeros(1, 32)
    x[0, 11] = 1.0
    y = block_hadamard(x, 8)
    torch.testing.assert_close(y[0, 8:16].abs(), torch.full((8,), 8**-0.5))
    assert not y[0, :8].any()
    assert not y[0, 16:].any()


def test_equals_the_block_diagonal_matrix():
    x = torch.randn(4, 24, dtype=torch.float64)
    h = torch.block_diag(*[hadamard_matrix(8, torch.float64, CPU)] * 3)
    torch.testing.assert_close(block_hadamard(x, 8), x @ h)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_stays(dtype):
    assert block_hadamard(torch.ones(2, 16, dtype=dtype), 16).dtype == dtype


@pytest.mark.parametrize("block", [4, 16, 256])
def test_regular_ones_are_orthogonal_and_no_column_stands_out(block):
    h = hadamard_matrix(block, torch.float64, CPU, "regular")
    torch.testing.assert_close(h @ h.T, torch.eye(block, dtype=h.dtype), atol=1e-12, rtol=0)
    torch.testing.assert_close(h.abs(), torch.full_like(h, block**-0.5))
    torch.testing.assert_close(h.sum(0), torch.ones(block, dtype=h.dtype))
    assert hadamard_matrix(block, torch.float64, CPU).sum(0).max() == pytest.approx(block**0.5)


def test_a_constant_offset_stays_spread_in_regular_blocks_only():
    x = torch.ones(1, 256, dtype=torch.float64)
    torch.testing.assert_close(block_hadamard(x, 256, "regular"), x)
    assert block_hadamard(x, 256).max() == pytest.approx(16)


@pytest.mark.parametrize(
    ("dim", "block"), [(3072, 256), (1152, 64), (2240, 64), (5600, 16), (6, 1)]
)
def test_regular_blocks_are_powers_of_four(dim, block):
    assert hadamard_block(dim, 256, "regular") == block
    with pytest.raises(ValueError, match="power of four, got 32"):
        hadamard_matrix(32, torch.float32, CPU, "regular")
