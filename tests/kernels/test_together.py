"""Linears called together give what each gives alone; interpreted where there is no GPU.

Inputs are fp16, as elsewhere: the interpreter computes bf16 products wrongly.
"""

import pytest
import torch
from formats import DEVICE, random_linear
from tiny_spec import tiny_spec
from torch import Tensor

from dirotq.kernels import together as module
from dirotq.kernels.linear import QuantLinear, frozen
from dirotq.kernels.together import MOST_ROWS, Together
from dirotq.kernels.w4a16_linear import w4a16_linear

HALF = torch.float16
GROUPED = {"act_bits": 16, "weight_scale": "group", "weight_group": 32}


def linear(outputs: int, *, seed: int = 0, bias: bool = True, **spec) -> QuantLinear:
    made = random_linear(tiny_spec(rows=(outputs,), **GROUPED | spec), bias=bias)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, made.qweight.shape, generator=generator)
    made.qweight.copy_(codes)
    return made


def x_of(rows: int, width: int = 64) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(DEVICE, HALF)


def alone(one: QuantLinear, x: Tensor) -> Tensor:
    """The same kernel and tile, launched for this linear."""
    from dirotq.kernels.w4a16_linear.kernel import launch
    from dirotq.kernels.w4a16_linear.tiles import TILES

    return launch(x, one.packed(), tile=TILES["row"][0])


@pytest.fixture
def launches(monkeypatch) -> list[int]:
    """Linears of every launch; the device passes for a GPU that nobody measured."""
    kernel = pytest.importorskip("dirotq.kernels.w4a16_linear.kernel")
    counts: list[int] = []
    launch_many = kernel.launch_many

    def counted(x, table, outputs, *args, **kwargs):
        counts.append(len(outputs))
        return launch_many(x, table, outputs, *args, **kwargs)

    monkeypatch.setattr(kernel, "launch_many", counted)
    monkeypatch.setattr(module, "capability", lambda device: 87)
    return counts


def assert_equal(got: list[Tensor], linears, x: Tensor) -> None:
    assert len(got) == len(linears)
    for y, one in zip(got, linears):
        assert y.dtype == x.dtype and y.is_contiguous()
        assert y.shape == (*x.shape[:-1], one.spec.outputs)
        assert torch.equal(y, alone(one, x.reshape(-1, x.shape[-1])).view(y.shape))


@pytest.mark.parametrize("rows", [1, 3, MOST_ROWS])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_equals_each_linear_alone(rows, bias, launches, empty_is):
    linears = [linear(n, seed=n, bias=bias) for n in (20, 16, 5)]
    together, x = Together(linears), x_of(rows)
    assert together.why_not is None
    for byte in (255, 0):
        with empty_is(byte):
            got = together(x)
        assert_equal(got, linears, x)
    assert launches == [3, 3]
    for y, one in zip(got, linears):
        want = w4a16_linear(x, one.qweight, one.wscale, one.bias)
        torch.testing.assert_close(y.float(), want, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize(
    "spec",
    [
        {"dim": 2048, "weight_group": 64},
        {"dim": 96},
        {"dim": 72, "weight_scale": "channel"},
        {"dim": 1024, "weight_scale": "channel"},
    ],
    ids=str,
)
def test_widths_and_groups(spec, launches):
    linears = [linear(n, seed=n, **spec) for n in (24, 8)]
    x = x_of(2, spec["dim"])
    assert_equal(Together(linears)(x), linears, x)
    assert launches == [2]


@pytest.mark.parametrize("count", [1, 2, 9])
def test_any_number_of_linears(count, launches):
    linears = [linear(16 + 8 * (i % 3), seed=i) for i in range(count)]
    assert_equal(Together(linears)(x_of(1)), linears, x_of(1))
    assert launches == [count]


def test_any_shape_and_strides_of_the_input(launches):
    linears = [linear(24), linear(16, seed=1)]
    together = Together(linears)
    for x in (x_of(3, 150)[:, 5:69], x_of(2, 128)[:, ::2], x_of(64, 3).mT, x_of(4).view(2, 2, 64)):
        assert_equal(together(x), linears, x)
    assert_equal(together(x_of(1)[0]), linears, x_of(1)[0])
    assert len(launches) == 5


def test_a_buffer_that_moved_is_found(launches, monkeypatch):
    linears = [linear(24), linear(16, seed=1)]
    together, x, tables = Together(linears), x_of(1), []
    table = module._table
    monkeypatch.setattr(module, "_table", lambda *a: tables.append(1) or table(*a))
    for _ in range(3):
        assert_equal(together(x), linears, x)
    assert len(tables) == 1
    for name in ("qweight", "wscale", "bias"):
        old = getattr(linears[1], name)
        changed = old + 1 if name == "qweight" else old * 2
        setattr(linears[1], name, frozen(changed))
        old.fill_(0)
        assert_equal(together(x), linears, x)
    assert len(tables) == 4
    linears[0].load_state_dict(linear(24, seed=7).state_dict())  # in place: nothing moves
    assert_equal(together(x), linears, x)
    assert len(tables) == 4


def test_buffers_that_the_kernel_cannot_read_are_called(launches):
    linears = [linear(24), linear(16, seed=1)]
    together, x = Together(linears), x_of(1)
    for changed in (
        linears[1].wscale.float(),
        linears[1].wscale.mT.contiguous().mT,
        torch.cat([linears[1].wscale.flatten()[:1], linears[1].wscale.flatten()])[1:].view(16, 2),
    ):
        before, linears[1].wscale = linears[1].wscale, frozen(changed)
        assert_called(together, linears, x)
        linears[1].wscale = before
    assert launches == []
    assert_equal(together(x), linears, x)
    assert launches == [2]


def assert_called(together: Together, linears, x: Tensor) -> None:
    for y, one in zip(together(x), linears, strict=True):
        assert torch.equal(y, one(x))


@pytest.mark.parametrize(
    "x",
    [x_of(MOST_ROWS + 1), x_of(0), x_of(2).float(), x_of(1).double()],
    ids=["rows", "none", "float32", "float64"],
)
def test_other_inputs_are_called(x, launches):
    linears = [linear(24), linear(16, seed=1)]
    assert_called(Together(linears), linears, x)
    assert launches == []


def test_compilers_see_calls(launches, monkeypatch):
    linears = [linear(24), linear(16, seed=1)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_called(Together(linears), linears, x_of(1))
    assert launches == []


@pytest.mark.parametrize("chip", [None, 75])
def test_other_devices_call(chip, launches, monkeypatch):
    monkeypatch.setattr(module, "capability", lambda device: chip)
    linears = [linear(24), linear(16, seed=1)]
    assert_called(Together(linears), linears, x_of(1))
    assert launches == []


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([linear(16, act_bits=4)], "W4A4 linears quantize their input"),
        ([linear(16, weight_group=16)], "scales per 64 columns fit no kernel"),
        ([linear(16, rank=8)], "transform their input"),
        ([linear(16, block=16)], "transform their input"),
        ([linear(16, bias=False)], "differ in width, group or bias"),
        ([linear(16, weight_group=64)], "differ in width, group or bias"),
        ([torch.nn.Linear(64, 8, device=DEVICE, dtype=HALF)], "Linear is no packed linear"),
    ],
    ids=["w4a4", "group", "rank", "block", "bias", "groups", "16 bits"],
)
def test_linears_of_other_kinds_are_called(others, said, launches):
    linears = [linear(24), *others]
    together = Together(linears)
    assert together.why_not is not None and said in together.why_not
    assert_called(together, linears, x_of(1))
    assert launches == []


def test_fp4_has_no_kernel():
    spec = tiny_spec(act_bits=16, weight_scale="nvfp4")
    assert "NVFP4 has no kernel" in (Together([QuantLinear(spec, bias=True)]).why_not or "")


def test_an_input_that_fits_no_linear_is_refused(launches):
    together = Together([linear(24), linear(16)])
    with pytest.raises(ValueError, match="this linear takes 64"):
        together(x_of(1, 32))
    assert Together([])(x_of(1)) == []


def test_weights_elsewhere_are_called(launches):
    """As where a hook brings them in for a call only: the linear itself says what is wrong."""
    linears = [linear(24), linear(16).to("meta")]
    with pytest.raises(ValueError, match="the packed weights are on meta"):
        Together(linears)(x_of(1))
    assert launches == []


def test_the_tile_is_what_was_measured(monkeypatch):
    from dirotq.kernels.w4a16_linear.tiles import TILES

    linears = [linear(24)]
    for chip in (80, 90, 120):
        monkeypatch.setattr(module, "capability", lambda device, chip=chip: chip)
        assert module._tile(linears, DEVICE) in TILES["row"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF], ids=str)
@pytest.mark.parametrize("rows", [1, 4])
def test_modulators_of_flux(rows, dtype):
    """As many programs as a grid's second axis would not take."""
    spec = {"dim": 3072, "weight_group": 64}
    linears = [linear(n, seed=i, **spec) for i, n in enumerate((18432, 9216))] * 38
    x = torch.randn(rows, 3072, device=DEVICE).to(dtype)
    assert_equal(Together(linears)(x), linears, x)
