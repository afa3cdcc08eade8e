import pytest
import torch

from dirotq.kernels import second_moment
from dirotq.kernels.second_moment import TILE, accumulate, new, tiles, trace, unpack

DIMS = (1, 40, TILE, TILE + 1, 3 * TILE, 700)


def activations(tokens: int, dim: int) -> torch.Tensor:
    """Small integers: every sum is exact in float32 and in bf16's products."""
    generator = torch.Generator().manual_seed(tokens * 1000 + dim)
    return torch.randint(-8, 9, (tokens, dim), generator=generator).float()


@pytest.mark.parametrize(("dim", "count"), [(1, 1), (256, 1), (257, 3), (3072, 78), (15360, 1830)])
def test_the_lower_triangle_is_all_there_is(dim, count):
    assert tiles(dim) == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", DIMS)
def test_unpacks_to_the_sum_of_all_calls(dim, dtype):
    total, calls = new(dim), [activations(tokens, dim) for tokens in (5, 0, 33)]
    for x in calls:
        accumulate(total, x.to(dtype))
    whole = unpack(total, dim)
    assert whole.dtype == torch.float32
    assert torch.equal(whole, sum(x.T @ x for x in calls))
    assert torch.equal(whole, whole.T)
    assert trace(total, dim) == whole.diagonal().sum()


def test_every_tile_stands_in_its_place_and_padding_is_zero():
    dim, x = 2 * TILE + 10, activations(20, 2 * TILE + 10)
    total = new(dim)
    accumulate(total, x)
    padded = torch.zeros(3 * TILE, 3 * TILE)
    padded[:dim, :dim] = x.T @ x
    for i in range(3):
        for j in range(i + 1):
            want = padded[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE]
            assert torch.equal(total[i * (i + 1) // 2 + j], want)


def test_rows_may_lie_apart_and_columns_too():
    wide = activations(9, 600)
    for x in (wide[:, 100:400], wide[::2, :300], wide[:, ::2]):
        total = new(300)
        accumulate(total, x)
        assert torch.equal(unpack(total, 300), x.T @ x)


def test_sums_are_float32_whatever_goes_in():
    """In bf16, 256 + 1 is 256."""
    total, x = new(1), torch.ones(300, 1, dtype=torch.bfloat16)
    for _ in range(3):
        accumulate(total, x)
    assert unpack(total, 1).item() == 900


def test_tf32_is_off_inside_and_back_on_outside(monkeypatch):
    seen = []
    multiply = torch.Tensor.__matmul__

    def spy(a, b):
        seen.append(torch.get_float32_matmul_precision())
        return multiply(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        accumulate(new(8), activations(3, 8))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, TILE + 3])
def test_the_trace_shows_what_is_not_finite(bad, place):
    total, x = new(TILE + 20), activations(4, TILE + 20)
    x[2, place] = bad
    accumulate(total, x)
    assert not trace(total, TILE + 20).isfinite()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: accumulate(new(256), torch.zeros(4, 257)), r"257 channels.*\(3, 256, 256\)"),
        (lambda: accumulate(new(8), torch.zeros(2, 4, 8)), r"\(2, 4, 8\).*flatten"),
        (lambda: unpack(new(600), 256), r"256 channels.*new\(256\)"),
        (lambda: trace(new(600), 256), r"256 channels.*new\(256\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_the_reference_serves_every_cpu(monkeypatch):
    monkeypatch.setattr(second_moment, "why_reference", lambda chip: pytest.fail("asked a CPU"))
    accumulate(new(8), torch.zeros(2, 8, dtype=torch.bfloat16))
