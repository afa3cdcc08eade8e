"""The Triton ``sweep`` against its specification, on the CPU's interpreter.

Fractions of small powers of two keep every sum exact, so results must be equal, ties included.
"""

import pytest
import torch

pytest.importorskip("triton")

from builds.gptq import builds

from dirotq.kernels import gptq as op
from dirotq.kernels.formats.lm4 import BETWEEN, CODES
from dirotq.kernels.formats.quantize_weight import weight_steps
from dirotq.kernels.gptq import reference
from dirotq.kernels.gptq.kernel import COLUMNS, ROWS, launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operands(rows: int, columns: int, *, grouped: bool, fine: bool = False):
    """Draw weights and steps of 1/4 to 2, or a sixteenth of that, as units of LM4 are."""
    generator = torch.Generator().manual_seed(100 * rows + columns + grouped)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).float()

    w = integers(-60, 61, rows, columns) / 8
    target = w + integers(-8, 9, rows, columns) / 8
    step = torch.exp2(integers(-2, 2, rows, columns if grouped else 1))
    step /= 16 if fine else 1
    step[rows // 2] = 0
    f = (integers(-2, 3, columns, columns) / 4).triu(1)
    f *= torch.rand(columns, columns, generator=generator) < 0.2
    f += torch.eye(columns)
    return tuple(t.to(DEVICE) for t in (w, target, step, f))


@pytest.mark.parametrize("element", ["int4", "lm4"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 128), (ROWS + 3, 40), (2 * ROWS, 97)])
def test_equals_the_reference(rows, columns, grouped, element, empty_is):
    given = operands(rows, columns, grouped=grouped, fine=element == "lm4")
    want_codes, want_error = reference.sweep(*given, element=element)
    with empty_is(255):
        codes, error = launch(*given, element=element)
    assert codes.dtype == torch.int8
    assert torch.equal(codes, want_codes)
    assert torch.equal(error, want_error)


def test_the_operands_have_ties_and_codes_at_both_ends():
    w, target, step, f = operands(2 * ROWS, 128, grouped=False)
    codes, error = reference.sweep(w, target, step, f)
    assert {-7, 7} <= set(codes.flatten().tolist())
    left = target + error @ f.triu(1)
    positive = step[:, 0] > 0
    ties = (left[positive] / step[positive]).frac().abs() == 0.5
    assert ties.float().mean() > 0.02


def test_the_operands_of_levels_have_every_code_and_ties():
    w, target, step, f = operands(2 * ROWS, 128, grouped=False, fine=True)
    codes, error = reference.sweep(w, target, step, f, element="lm4")
    assert set(codes.flatten().tolist()) == {*CODES, *(-code for code in CODES)}
    left = target + error @ f.triu(1)
    positive = step[:, 0] > 0
    ties = torch.isin((left[positive] / step[positive]).abs(), torch.tensor(BETWEEN))
    assert ties.float().mean() > 0.01


def test_operands_may_be_parts_of_larger_ones():
    w, target, step, f = operands(20, 64, grouped=True)
    given = w, target, step, f
    want = reference.sweep(*given)
    apart = [torch.full((20, 100), torch.nan, device=DEVICE) for _ in range(3)]
    for part, whole in zip((w, target, step), apart):
        whole[:, 30:94] = part
    triangle = torch.full((80, 80), torch.nan, device=DEVICE)
    triangle[8:72, 8:72] = f
    found = launch(*(whole[:, 30:94] for whole in apart), triangle[8:72, 8:72])
    turned = launch(*(part.mT.contiguous().mT for part in given))
    for got in (found, turned):
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_a_bad_row_keeps_to_itself():
    w, target, step, f = operands(12, 64, grouped=False)
    want, _ = launch(w, target, step, f)
    w[3, 5] = target[3, 5] = torch.nan
    codes, _ = launch(w, target, step, f)
    others = [i for i in range(12) if i != 3]
    assert torch.equal(codes[others], want[others])


def test_wider_blocks_are_refused():
    given = operands(2, COLUMNS + 1, grouped=False)
    with pytest.raises(ValueError, match="129 columns is wider than the 128"):
        launch(*given)
    assert reference.BLOCK <= COLUMNS


@pytest.mark.parametrize("element", ["int4", "lm4"])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_whole_method_on_the_kernel(groups, element):
    """Sums are made in another order, so a code near a tie may differ, the loss hardly."""
    generator = torch.Generator().manual_seed(groups)
    w = torch.randn(20, 160, generator=generator).to(DEVICE)
    mix = torch.randn(160, 160, generator=generator, dtype=torch.float64)
    x = torch.randn(500, 160, generator=generator, dtype=torch.float64) @ mix
    s = (x.T @ x / 500).to(DEVICE)
    scale = (w.unflatten(1, (groups, -1)).abs().amax(-1) / 7).to(torch.bfloat16)
    scale = weight_steps(scale, None, element)
    plain, _ = reference.gptq(w, s, scale, damping=0.01, element=element)
    codes, counts = reference.gptq(w, s, scale, damping=0.01, element=element, sweep=launch)
    assert counts == {"escalations": 0, "nearest": 0}
    assert (codes != plain).float().mean() < 0.01
    ours, theirs = (
        op.hessian_error((q * scale.float().repeat_interleave(160 // groups, 1) - w).double(), s)
        for q in (codes, plain)
    )
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0)


def test_a_gpu_takes_the_kernel_and_float64_the_reference(monkeypatch):
    class OnGpu:
        def __init__(self, size: int) -> None:
            self.size, self.device = size, torch.device("cuda")

        def element_size(self) -> int:
            return self.size

    monkeypatch.setattr(op, "capability", lambda device: 90)
    assert op._sweep(OnGpu(4)) is launch
    assert op._sweep(OnGpu(4), "lm4") is launch
    assert op._sweep(OnGpu(8)) is reference.sweep
    assert op._sweep(torch.zeros(1)) is reference.sweep
    said = []
    monkeypatch.setattr(op, "say_once", lambda message, level: said.append(message))
    assert op._sweep(OnGpu(4), "e2m1") is reference.sweep
    assert "FP4 columns in plain torch" in said.pop()
    monkeypatch.setattr(op, "capability", lambda device: 70)
    assert op._sweep(OnGpu(4)) is reference.sweep
    assert "compute capability 7.0" in said[0]


def test_builds_cover_both_kinds_of_scales():
    assert [build.name for build in builds()] == [
        "gptq-sweep-int4-channel", "gptq-sweep-int4-group",
        "gptq-sweep-lm4-channel", "gptq-sweep-lm4-group",
    ]  # fmt: skip
    assert not any(build.tensor_core for build in builds())
