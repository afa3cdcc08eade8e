"""Recorded launches on a real GPU: bit for bit what the same call computes without them."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from formats import DEVICE, random_linear, spec_of
from torch import Tensor

pytest.importorskip("triton")
import triton

from dirotq.kernels import ops, recorder
from dirotq.kernels.build import Config
from dirotq.kernels.chip import capability
from dirotq.kernels.linear import QuantLinear
from dirotq.kernels.plan import Plan, candidates_for
from dirotq.kernels.recorder import Recorder

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

CHIP = capability(DEVICE) or 90
FORMATS = ("rms", "pow2", "floats", "token", "w4a8", "groups", "w4a16")
"""All but those that torch computes a part of (rank 0, dense rotations, W4A16 with a branch)."""

BF16 = torch.bfloat16


def rows_of(name: str) -> int:
    """A few, as W4A16 linears read; enough for every engine of the others."""
    return 3 if name == "w4a16" else 33


def plans(name: str, rows: int) -> dict[str, Plan]:
    """The first plan of every engine, kind of tile and way to read it."""
    found: dict[str, Plan] = {}
    for plan in candidates_for(CHIP, rows, 1008, spec_of(name, 2240, 1008), BF16):
        tile = plan.tile
        way = getattr(tile, "kind", None) or ("tma" if getattr(tile, "tma", False) else "tile")
        found.setdefault(f"{name}-{plan.engine}-{way}", plan)
    return found


PLANS = [
    pytest.param(name, plan, id=key)
    for name in FORMATS
    for key, plan in plans(name, rows_of(name)).items()
]


@pytest.fixture
def usual(monkeypatch) -> Callable[[str], None]:
    """``usual(name)`` takes one plan for a format whatever was measured: no descriptors."""

    def choose(name: str, engine: str = "scaled_mm") -> None:
        found = list(plans(name, rows_of(name)).values())
        plan = next((plan for plan in found if plan.engine == engine), found[0])
        monkeypatch.setattr(ops, "choose", lambda *_: plan)

    return choose


def drawn(rows: int, dim: int) -> Tensor:
    """Gaussian rows, others each time."""
    return torch.randn(rows, dim, device=DEVICE, dtype=BF16)


@pytest.fixture
def launched(monkeypatch) -> Iterator[list[str]]:
    """Kernels that went through Triton's Python."""
    found, real = [], Config.launch

    def launch(self, grid, *arguments):
        found.append(self.kernel.__name__)
        real(self, grid, *arguments)

    monkeypatch.setattr(Config, "launch", launch)
    recorder.forget()
    yield found
    recorder.forget()


def computed(module: QuantLinear, x: Tensor, rows=None, prologue="plain", behind=None) -> Tensor:
    key = ops.format_key(module.spec)
    return ops._by_plan(x, module.packed(), key, rows, prologue, behind)


def called(module: QuantLinear, x: Tensor, rows=None, prologue="plain", behind=None) -> Tensor:
    p = module.packed()
    return ops.quant_linear(
        x, p.qweight, p.wscale, p.wglobal, p.basis, p.rotation, p.wp, p.bias,
        ops.format_key(module.spec), p.smooth, p.wpscale, rows, prologue, behind,
    )  # fmt: skip


def assert_repeated(launched: list[str], module: QuantLinear, make, *more) -> None:
    """Call with what ``make`` makes, three times; all but the first repeat its launches."""
    for number in range(3):
        x, behind = make()
        want = computed(module, x, *more, behind)
        launched.clear()
        got = called(module, x, *more, behind)
        assert bool(launched) == (number == 0)
        assert torch.equal(got, want)
        assert got.stride() == want.stride()


@pytest.mark.parametrize(("name", "plan"), PLANS)
def test_every_plan(name, plan, launched, monkeypatch):
    rows = rows_of(name)
    monkeypatch.setattr(ops, "choose", lambda *_: plan)
    module = random_linear(spec_of(name, 2240, 1008))
    if getattr(plan.tile, "tma", False):
        for x in drawn(2 * rows, 2240).split(rows):
            assert torch.equal(module(x), computed(module, x))
            launched.clear()
            module(x)
            assert launched
    else:
        assert_repeated(launched, module, lambda: (drawn(rows, 2240), None), None, "plain")


@pytest.mark.parametrize("rows", [None, [16, 80], [512, 1008]], ids=str)
@pytest.mark.parametrize("prologue", ["plain", "gelu", "concat"])
@pytest.mark.parametrize("engine", ["scaled_mm", "packed", "unpacked"])
def test_prologues_of_slices_and_some_outputs(engine, prologue, rows, launched, usual):
    usual("rms", engine)

    def make():
        wide = torch.randn(2, 40, 1536, device=DEVICE, dtype=BF16)[:, 3:36]
        if prologue == "concat":
            return wide[..., :1024], wide[..., 1024:1280]
        return wide[..., 256:], None

    module = random_linear(spec_of("rms", 1280, 1008))
    assert_repeated(launched, module, make, rows, prologue)


@pytest.mark.parametrize("name", ["rms", "w4a16"])
def test_an_address_off_the_lines_is_another_kind(name, launched, usual):
    usual(name)
    module = random_linear(spec_of(name, 2240, 1008))

    def make(shift: int):
        row = drawn(1, 33 * 2240 + 8)[0]
        return row[shift : shift + 33 * 2240].view(33, 2240), None

    for shift in (0, 1, 8):  # 0, 2 and 16 bytes
        if shift == 8:
            launched.clear()
            module(make(8)[0])
            assert not launched  # as 0
        else:
            assert_repeated(launched, module, lambda at=shift: make(at), None, "plain")


@pytest.mark.parametrize("name", ["rms", "pow2", "w4a16"])
def test_weights_that_come_and_go(name, launched, usual):
    usual(name)
    module, x = random_linear(spec_of(name, 2240, 1008)), drawn(33, 2240)
    want, held, seen = module(x), [], set()
    for _ in range(4):
        seen.add(module.qweight.data_ptr())
        module.to("cpu")
        held.append(torch.full((module.qweight.numel(),), 255, dtype=torch.uint8, device=DEVICE))
        module.to(DEVICE)
        launched.clear()
        assert torch.equal(module(x), want)
        assert not launched
    assert len(seen) > 1


def noted(module: QuantLinear, x: Tensor) -> recorder.Recording:
    with Recorder((x, None, *module.packed()), x.device) as noting:
        y = computed(module, x)
    found = noting.recording(y)
    assert found is not None, noting.why
    return found


def test_a_side_stream_where_it_is_worth_it(launched, usual):
    """A large product's weights are unpacked beside the transform; a small one's in a graph."""
    usual("rms")
    large = random_linear(spec_of("rms", 3072, 9216))
    x = drawn(4608, 3072)
    assert noted(large, x).forks
    for _ in range(20):
        x = torch.randn_like(x)
        assert torch.equal(large(x), computed(large, x))
    small, x = random_linear(spec_of("rms", 1152, 1152)), drawn(4096, 1152)
    computed(small, x)
    assert not noted(small, x).forks
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert noted(small, x).forks


@pytest.mark.parametrize("first", ["before", "within"])
@pytest.mark.parametrize(
    ("name", "rows"), [("rms", 4096), ("pow2", 4096), ("rms", 33), ("w4a16", 1)]
)
def test_in_a_graph(name, rows, first, launched, usual):
    """Recorded before or while a graph is captured, and repeated there."""
    usual(name, "packed" if rows == 33 else "scaled_mm")
    module, x = random_linear(spec_of(name, 1152, 1152)), drawn(rows, 1152)
    computed(module, x)  # compiled
    if first == "before":
        module(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module(x)
        launched.clear()
        y = module(x)
        assert not launched
        again = module(y)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        want = computed(module, x)
        assert torch.equal(y, want)
        assert torch.equal(again, computed(module, want))


@pytest.mark.parametrize("name", ["rms", "pow2", "w4a16"])
def test_two_streams(name, launched, usual):
    usual(name)
    rows = 1 if name == "w4a16" else 512
    module = random_linear(spec_of(name, 2240, 2240))
    streams = [torch.cuda.Stream() for _ in range(2)]
    xs = [drawn(rows, 2240) for _ in streams]
    wanted = [computed(module, computed(module, x)) for x in xs]
    module(xs[0])
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for _ in range(30):
        for stream, x, mine in zip(streams, xs, found, strict=True):
            with torch.cuda.stream(stream):
                mine.append(module(module(x)))
    torch.cuda.synchronize()
    for mine, want in zip(found, wanted, strict=True):
        assert all(torch.equal(y, want) for y in mine)


def test_two_threads(launched, usual):
    """Both record the same kind at once, then repeat it on streams of their own."""
    usual("rms")
    module = random_linear(spec_of("rms", 2240, 2240))
    xs = [drawn(512, 2240) for _ in range(2)]
    wanted = [computed(module, x) for x in xs]
    torch.cuda.synchronize()
    right, start = [0, 0], threading.Barrier(2)

    def work(mine: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            start.wait()
            for _ in range(100):
                right[mine] += torch.equal(module(xs[mine]), wanted[mine])

    threads = [threading.Thread(target=work, args=(mine,)) for mine in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [100, 100]


def test_who_watches_launches_sees_them(launched, usual):
    usual("rms")
    module, x = random_linear(spec_of("rms", 2240, 1008)), drawn(33, 2240)
    want, seen = module(x), []
    module(x)
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(seen.append)
    try:
        assert torch.equal(module(x), want)
    finally:
        hook.remove(seen.append)
    assert len(seen) >= 3


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_under_every_mode_of_gradients(mode, launched, usual):
    usual("rms")
    module = random_linear(spec_of("rms", 2240, 1008))
    with mode():
        assert_repeated(launched, module, lambda: (drawn(33, 2240), None), None, "plain")


@pytest.mark.parametrize(("name", "rows"), [("rms", 33), ("rms", 4096), ("w4a16", 1)])
def test_the_host_is_free_in_a_fraction_of_the_time(name, rows, usual):
    usual(name)
    module, x = random_linear(spec_of(name, 1152, 1152)), drawn(rows, 1152)

    def host(call) -> float:
        times = []
        for _ in range(30):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return sorted(times)[15]

    with torch.no_grad():
        assert host(lambda: module(x)) < 0.5 * host(lambda: computed(module, x))
