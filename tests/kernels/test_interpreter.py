"""The interpreter's reductions by slices (tests/support/interpreter.py) against its own."""

import pytest
import torch

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels run on the GPU", allow_module_level=True)

import interpreter  # noqa: E402
import triton.language as tl  # noqa: E402

ROWS, MIDDLE, COLUMNS = 4, 8, 2


@triton.jit
def _halve_and_add(a, b):
    return a * 0.5 + b  # the order shows


@triton.jit
def _larger_with_place(a, i, b, j):
    return tl.where(b > a, b, a), tl.where(b > a, j, i)


@triton.jit
def _reduce(x, y, AXIS: tl.constexpr, KEEP: tl.constexpr, R: tl.constexpr, M: tl.constexpr,
            C: tl.constexpr):  # fmt: skip
    o = (tl.arange(0, R)[:, None, None] * M + tl.arange(0, M)[None, :, None]) * C
    block = tl.load(x + o + tl.arange(0, C)[None, None, :])
    kept = tl.reduce(block, AXIS, _halve_and_add, keep_dims=KEEP)
    kept = tl.reshape(kept, (R * M * C // block.shape[AXIS],))
    tl.store(y + tl.arange(0, R * M * C // block.shape[AXIS]), kept)


@triton.jit
def _reduce_rows(x, y, i, N: tl.constexpr):
    o = tl.arange(0, N)
    largest, place = tl.reduce((tl.load(x + o), o), 0, _larger_with_place)
    tl.store(y, largest)
    tl.store(i, place)


@pytest.fixture(params=["by_element", "by_slice"])
def reduction(request, monkeypatch):
    chosen = getattr(interpreter, request.param)
    monkeypatch.setattr("triton.runtime.interpreter.ReduceOps.generic_reduce", chosen)


@pytest.mark.usefixtures("reduction")
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("keep", [True, False])
def test_along_an_axis_in_its_order(axis, keep):
    x = torch.randn(ROWS, MIDDLE, COLUMNS, generator=torch.Generator().manual_seed(0))
    x[1, 2, 1] = torch.nan
    want, *rest = x.unbind(axis)
    for part in rest:
        want = want * 0.5 + part
    y = torch.full((want.numel(),), 9.0)
    _reduce[(1,)](x, y, axis, keep, ROWS, MIDDLE, COLUMNS)
    torch.testing.assert_close(y, want.flatten(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("reduction")
def test_of_several_tensors_to_one_value():
    x = torch.tensor([3.0, 7.0, -1.0, 7.0])
    y, i = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    _reduce_rows[(1,)](x, y, i, 4)
    assert (y.item(), i.item()) == (7.0, 1)
