"""Recorded launches: the same result at other addresses, and what isn't recorded runs as always.

The kernels are functions that read and write memory by address, as compiled ones do.
"""

import ctypes
import functools
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton

from dirotq.kernels import chip, recorder, recording
from dirotq.kernels.build import Config

N = 96
"""Elements of what the kernels below add."""


class Launcher:
    """Adds SCALE times the second array to the first in a third; notes what it was given.

    nested  arguments are handed on as one sequence, as Triton 3.7 does
    """

    global_scratch_size = profile_scratch_size = 0

    def __init__(self, *, nested: bool = False) -> None:
        self.calls: list[tuple] = []
        self.nested = nested

    def __call__(self, gx, gy, gz, stream, function, metadata, launch, enter, leave, *arguments):
        known = function, True, metadata, launch, enter, leave
        arguments = (arguments,) if self.nested else arguments
        self.launch(gx, gy, gz, stream, *known, *arguments)

    def launch(self, gx, gy, gz, stream, *arguments):
        if self.nested:
            *arguments, last = arguments
            arguments = *arguments, *last
        assert tuple(arguments[:6]) == ("function", True, "metadata", None, None, None)
        p_x, p_y, p_out, n, scale = arguments[6:]
        self.calls.append(((gx, gy, gz), stream, (p_x, p_y, p_out)))
        x, y, out = (floats(p, n) for p in (p_x, p_y, p_out))
        out[:] = x + np.float32(scale) * y


class Kernel:
    """What ``triton.jit`` makes, as far as ``Config.launch`` knows it."""

    arg_names = ("p_x", "p_y", "p_out", "n", "SCALE")

    def __init__(self) -> None:
        self.launcher, self.runs = Launcher(), 0
        self.compiled = SimpleNamespace(
            function="function", packed_metadata="metadata", run=self.launcher
        )

    def __getitem__(self, grid):
        def launch(*tensors, SCALE, **options):
            *tensors, n = tensors
            self.runs += 1
            at = [getattr(t, "base", t).data_ptr() for t in tensors]
            known = "function", "metadata", None, None, None
            self.launcher(*grid, 1, 0, *known, *at, n, SCALE)
            self.launcher.calls.pop()  # only repeated launches are noted
            return self.compiled

        return launch


def floats(address: int, n: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_float * n).from_address(address), dtype=np.float32)


@pytest.fixture
def kernel():
    recorder.forget()
    yield Kernel()
    recorder.forget()


def compute(kernel: Kernel, x: Tensor, weight: Tensor) -> Tensor:
    """(x + 2 w) + 2 * (half of (x + 2 w), twice), by way of two temporaries."""
    config = Config(kernel=kernel, constants={"SCALE": 2.0})
    first, second = x.new_empty(2, N), torch.empty(N + 3)
    config.launch((1, 1), x, weight, first, N)
    config.launch((1, 1), x, weight, first[1], N)
    config.launch((2, 1), first[1], first, second[3:], N)
    y = x.new_empty(4, N // 4)
    config.launch((1, 3), second[3:], weight[N:], y.view(-1), N)
    return y.view(2, 2, -1)


def call(kernel: Kernel, x: Tensor, weight: Tensor, kind: str = "") -> Tensor:
    return recorder.recorded(kind, (x, None, weight), lambda: compute(kernel, x, weight))


def drawn() -> tuple[Tensor, Tensor]:
    return torch.randn(N), torch.randn(2 * N)


def wanted(x: Tensor, weight: Tensor) -> Tensor:
    return (3 * (x + 2 * weight[:N]) + 2 * weight[N:]).view(2, 2, -1)


@pytest.mark.parametrize("nested", [False, True])
def test_later_calls_launch_at_their_own_addresses(kernel, nested):
    kernel.launcher.nested = nested
    kept = [drawn() for _ in range(4)]
    for number, (x, weight) in enumerate(kept):
        y = call(kernel, x, weight)
        torch.testing.assert_close(y, wanted(x, weight))
        assert y.is_contiguous()
        assert kernel.runs == 4
        assert len(kernel.launcher.calls) == 4 * number
    grids = [grid for grid, _, _ in kernel.launcher.calls[-4:]]
    assert grids == [(1, 1, 1), (1, 1, 1), (2, 1, 1), (1, 3, 1)]


def test_temporaries_are_apart_and_the_result_is_a_tensor_of_its_own(kernel):
    call(kernel, *drawn())
    x, weight = drawn()
    y = call(kernel, x, weight)
    (_, _, (*_, first)), (_, _, (*_, inner)), (_, _, (*_, second)), last = kernel.launcher.calls
    assert inner == first + 4 * N
    assert abs(second - first) >= 4 * N
    assert last[2][2] == y.data_ptr()
    assert y.untyped_storage().nbytes() == 4 * N


def test_the_result_of_one_call_outlives_the_next(kernel):
    call(kernel, *drawn())
    one, other = drawn(), drawn()
    y = call(kernel, *one)
    call(kernel, *other)
    torch.testing.assert_close(y, wanted(*one))


def test_another_kind_is_recorded_by_itself(kernel):
    x, weight = drawn()
    shifted = torch.randn(N + 1)[1:]  # four bytes off
    for number, (kind, input) in enumerate((("", x), ("rows", x), ("", shifted)), 1):
        for _ in range(2):
            torch.testing.assert_close(call(kernel, input, weight, kind), wanted(input, weight))
        assert kernel.runs == 4 * number


def test_moved_weights_are_read_where_they_are(kernel):
    x, weight = drawn()
    call(kernel, x, weight)
    moved = weight.clone()
    weight.fill_(torch.nan)
    torch.testing.assert_close(call(kernel, x, moved), wanted(x, moved))
    assert kernel.runs == 4


def runs_as_always(kernel, call, times=3):
    before = kernel.runs
    for _ in range(times):
        call()
    return kernel.runs == before + 4 * times and not kernel.launcher.calls


def test_what_torch_computes_is_not_recorded(kernel):
    x, weight = drawn()
    changes = {
        "new": torch.relu,
        "in place": lambda x: x.add_(0),
        "copy": lambda x: x.view(2, -1).mT.contiguous(),
    }

    def changed(change):
        change(x)
        return compute(kernel, x, weight)

    for kind, change in changes.items():
        call = functools.partial(changed, change)
        again = functools.partial(recorder.recorded, kind, (x, None, weight), call)
        assert runs_as_always(kernel, again), kind


def test_an_argument_that_lies_in_no_or_in_two_tensors_is_not_recorded(kernel):
    x, weight = drawn()
    elsewhere = torch.randn(N)
    for tensors, read in (((x, weight), elsewhere), ((x, x[:], weight), x)):
        recorder.forget()
        call = functools.partial(compute, kernel, read, weight)
        again = functools.partial(recorder.recorded, "", tensors, call)
        assert runs_as_always(kernel, again)


def test_descriptors_are_not_recorded(kernel):
    x, weight = drawn()

    def described():
        config = Config(kernel=kernel, constants={"SCALE": 2.0})
        y = x.new_empty(N)
        for _ in range(4):
            config.launch((1, 1), SimpleNamespace(base=x), weight, y, N)
        return y

    assert runs_as_always(kernel, lambda: recorder.recorded("", (x, weight), described))


@pytest.mark.parametrize("version", ["3.4.0", "3.8.0", "4.0.0"])
def test_an_unknown_triton_launches_as_always_and_that_is_said(
    kernel, version, monkeypatch, caplog
):
    monkeypatch.setattr(triton, "__version__", version)
    chip.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger=chip.log.name):
        assert runs_as_always(kernel, lambda: call(kernel, *drawn()))
    assert [record.message.count(version) for record in caplog.records] == [1]
    chip.say_once.cache_clear()


@pytest.mark.parametrize("odd", ["scratch", "order", "stream"])
def test_another_launcher_is_not_taken_apart(kernel, odd):
    class Odd(Launcher):
        global_scratch_size = 16 if odd == "scratch" else 0

        def __call__(self, gx, gy, gz, stream, *arguments):
            if odd == "order":
                self.launch(gx, gy, gz, stream, *reversed(arguments))
            elif odd == "stream":
                self.launch(gx, gy, gz, str(stream), *arguments)

    kernel.compiled.run = Odd()
    assert runs_as_always(kernel, lambda: call(kernel, *drawn()))


def test_an_interpreted_kernel_is_not_recorded(kernel):
    class Interpreted(Kernel):
        def __getitem__(self, grid):
            launch = super().__getitem__(grid)
            return lambda *a, **k: [launch(*a, **k)].clear()

    interpreted = Interpreted()
    assert runs_as_always(interpreted, lambda: call(interpreted, *drawn()))


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_who_watches_launches_sees_all_of_them(kernel, hook, monkeypatch):
    call(kernel, *drawn())
    chain = type(triton.knobs.runtime.launch_enter_hook)()
    chain.add(print)
    for watching in (chain, print):
        monkeypatch.setattr(triton.knobs.runtime, hook, watching)
        assert runs_as_always(kernel, lambda: call(kernel, *drawn()))
    monkeypatch.setattr(triton.knobs.runtime, hook, type(chain)())
    call(kernel, *drawn())
    assert len(kernel.launcher.calls) == 4


def test_what_ran_on_the_side_stream_is_launched_there_between_fork_and_join(kernel, monkeypatch):
    current, events = [3], []

    class Stream:
        def __init__(self, handle: int) -> None:
            self.cuda_stream = handle

        def __getattr__(self, name):
            return lambda *_: events.append((self.cuda_stream, name))

    for module in (recorder, recording):
        monkeypatch.setattr(module, "stream_of", lambda device: current[0])
    monkeypatch.setattr(recording, "side_stream", lambda device: Stream(7))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(3))

    def on_two(x: Tensor, weight: Tensor) -> Tensor:
        config, y, z = (
            Config(kernel=kernel, constants={"SCALE": 2.0}),
            x.new_empty(N),
            torch.empty(N),
        )
        config.launch((1, 1), x, weight, z, N)
        current[0] = 7
        config.launch((1, 1), x, weight, y, N)
        current[0] = 3
        return y

    for _ in range(2):
        x, weight = drawn()
        y = recorder.recorded("", (x, None, weight), functools.partial(on_two, x, weight))
        torch.testing.assert_close(y, x + 2 * weight[:N])
    assert [stream for _, stream, _ in kernel.launcher.calls] == [3, 7]
    assert events == [(3, "record_event"), (7, "wait_event"), (3, "wait_stream")]


def test_a_failing_first_call_is_no_kind(kernel):
    x, weight = drawn()
    with pytest.raises(ZeroDivisionError):
        recorder.recorded("", (x, None, weight), lambda: 1 // 0)
    call(kernel, x, weight)
    call(kernel, x, weight)
    assert kernel.runs == 4
    assert recorder.RECORDER.get() is None


def test_the_product_of_torch_ends_a_recording(kernel):
    """Its operands are allocations of their own, as it wants them; one of them transposed."""
    n = 4 * N // 16

    def product(x: Tensor, weight: Tensor) -> Tensor:
        """Codes are the bytes of floats: finite numbers, but for the odd NaN."""
        config = Config(kernel=kernel, constants={"SCALE": 2.0})
        scales = x.new_empty(n, 1), x.new_empty(1, n)
        codes, weights = (torch.empty(n, 16, dtype=torch.float8_e4m3fn) for _ in range(2))
        for scale in scales:
            config.launch((1, 1), x, weight, scale, n)
        for bytes in (codes, weights):
            config.launch((1, 1), x, weight, bytes, N)
        y = torch._scaled_mm(
            codes, weights.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )  # fmt: skip
        return y.view(2, n // 2, n)

    def again(x: Tensor, weight: Tensor) -> Tensor:
        return recorder.recorded("", (x, weight), lambda: product(x, weight))

    again(*drawn())
    x, weight = torch.rand(N) + 1, torch.rand(2 * N) + 1
    y = again(x, weight)
    assert kernel.runs == len(kernel.launcher.calls) == 4
    assert (y.shape, y.dtype, y.is_contiguous()) == ((2, n // 2, n), torch.bfloat16, True)
    assert torch.equal(y.nan_to_num(0), product(x, weight).nan_to_num(0))
    assert y.isfinite().any()


def test_what_torch_adds_to_a_result_ends_a_recording(kernel):
    """In place, to what kernels wrote, from columns of another and rows of an input."""
    m, n, r = 4, N // 4, 3

    def added(x: Tensor, weight: Tensor) -> Tensor:
        config = Config(kernel=kernel, constants={"SCALE": 2.0})
        y, c = x.new_empty(m, n), x.new_empty(m, n)
        for out in (c, y):
            config.launch((1, 1), x, weight, out, N)
        up = weight.view(2, -1)[1][: n * r].view(n, r)
        return y.addmm_(c[:, 1 : 1 + r], up.mT).view(2, 2, n)

    for number in range(3):
        x, weight = drawn()
        got = recorder.recorded("", (x, weight), functools.partial(added, x, weight))
        assert bool(kernel.launcher.calls) == bool(number)
        first = (x + 2 * weight[:N]).view(m, n)
        want = first + first[:, 1 : 1 + r] @ weight[N : N + n * r].view(n, r).T
        torch.testing.assert_close(got, want.view(2, 2, n))


def test_a_kernel_behind_what_torch_computes_is_not_recorded(kernel):
    def behind() -> Tensor:
        config = Config(kernel=kernel, constants={"SCALE": 2.0})
        y, z = x.new_empty(N), x.new_empty(N)
        for out in (y, z):
            config.launch((1, 1), x, weight, out, N)
        y.view(-1, 1).addmm_(z.view(-1, 1), z[:1].view(1, 1))
        config.launch((1, 1), x, y, z, N)
        config.launch((1, 1), x, z, y, N)
        return y

    x, weight = drawn()
    assert runs_as_always(kernel, lambda: recorder.recorded("", (x, weight), behind))
