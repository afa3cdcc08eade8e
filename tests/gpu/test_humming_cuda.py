"""Humming's products on a real GPU: its layouts as it makes them itself, and whole linears."""

import itertools

import pytest
import torch
from formats import DEVICE, inputs, random_linear, spec_of
from torch import Tensor

pytest.importorskip("triton")

from dirotq.kernels import engine, ops, recorder
from dirotq.kernels.build import Config
from dirotq.kernels.chip import capability
from dirotq.kernels.formats.pack_int4 import pack_int4, unpack_int4
from dirotq.kernels.humming_linear import library
from dirotq.kernels.humming_linear.kernel import launch
from dirotq.kernels.linear import QuantLinear
from dirotq.kernels.permuted import to_permuted
from dirotq.kernels.plan import Plan, candidates_for
from dirotq.kernels.prologue import Prologue, concat_gelu, gelu, plain

CHIP = capability(DEVICE)
PLAN = Plan(engine="humming", container="int8")
BF16 = torch.bfloat16
FORMATS = ("rms", "pow2", "token", "token-r0", "w4a8")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("full_float32"),
    pytest.mark.skipif(
        CHIP not in library.CHIPS or library.missing() is not None,
        reason=library.missing() or "not one of its chips",
    ),
]


def assert_accurate(got: Tensor, x: Tensor, module: QuantLinear) -> None:
    """The error is below twice that of the specification in plain torch (test_kernels_cuda.py)."""
    want = engine.reference(x.double(), module.packed(), module.spec)
    plainly = engine.reference(x, module.packed(), module.spec)
    assert got.dtype == x.dtype and got.isfinite().all()
    ours, torchs = (float((y.double() - want).norm() / want.norm()) for y in (got, plainly))
    assert ours < 2 * torchs, f"relative error {ours:.2e}, plain torch {torchs:.2e}"


def assert_same(got: Tensor, want: Tensor) -> None:
    """Equal but for how sums are split between programs, which rounds them in another order."""
    assert (got.double() - want.double()).norm() <= 2.0**-7 * want.double().norm()


def called(module: QuantLinear, x: Tensor | Prologue) -> Tensor:
    return engine.linear(PLAN, x, module.packed(), module.spec)


@pytest.mark.parametrize(("n", "k"), [(64, 64), (192, 320), (1152, 4608), (3072, 15360)])
def test_layouts_are_those_that_humming_makes(n, k):
    """Weights as it takes them from a file: offset-binary nibbles, eight to a word."""
    from humming.config import LayerConfig
    from humming.transform import transform_humming_tensors

    module = random_linear(spec_of("token-r0", k, n))
    module.qweight.copy_(pack_int4(torch.randint(-8, 8, (n, k), dtype=torch.int8)))
    packed = module.packed()
    codes = to_permuted(unpack_int4(packed.qweight)).long() + 8
    words = (codes.view(n, k // 8, 8) << torch.arange(0, 32, 4, device=DEVICE)).sum(-1)
    config = LayerConfig(
        shape_n=n, shape_k=k, a_dtype="int8", b_dtype="uint4", c_dtype="bfloat16", has_bias=True
    )
    tensors = {"weight": words.to(torch.int32), "weight_scale": packed.wscale, "bias": packed.bias}
    want = transform_humming_tensors(config, tensors, already_padded=True)
    got = launch(packed)
    assert torch.equal(got.weights, want["weight"].view_as(got.weights))
    assert torch.equal(got.scale, want["weight_scale"].view_as(got.scale))
    assert torch.equal(got.bias, want["bias"])


@pytest.mark.parametrize("rows", [64, 600])
@pytest.mark.parametrize(
    ("k", "n"), [(2240, 1088), (1152, 4608), (4608, 1152), (3072, 3072), (256, 64)]
)
@pytest.mark.parametrize("name", FORMATS)
def test_linears(name, k, n, rows, empty_is):
    module, x = random_linear(spec_of(name, k, n)), inputs(rows, k)
    with empty_is(255):
        got = called(module, x)
    assert_accurate(got, x, module)


@pytest.mark.parametrize("rows", [1, 7, 33])
def test_few_rows(rows, empty_is):
    module, x = random_linear(spec_of("rms", 3072, 3072)), inputs(64, 3072)
    with empty_is(255):
        got = torch.cat([called(module, part) for part in x.split(rows)])
    assert_accurate(got, x, module)


@pytest.mark.parametrize(("k", "n"), [(15360, 3072), (12288, 3072), (3072, 9216)])
def test_shapes_of_flux(k, n):
    module, x = random_linear(spec_of("rms", k, n)), inputs(4608, k)
    assert any(p.engine == "humming" for p in candidates_for(CHIP, 4608, n, module.spec, BF16))
    assert_accurate(called(module, x), x, module)


@pytest.mark.parametrize("rank", [24, 320])
def test_other_ranks_without_bias(rank):
    name = "pow2-r24-b16" if rank == 24 else "token-rank-beyond-the-kernel"
    module = random_linear(spec_of(name, 2240, 1088), bias=False)
    x = inputs(64, 2240)
    assert_accurate(called(module, x), x, module)


@pytest.mark.parametrize("kind", ["plain", "gelu", "concat"])
def test_what_is_read_where_it_lies(kind):
    """Slices of a wider activation, as single blocks of FLUX read them."""
    module = random_linear(spec_of("rms", 3072, 1088))
    wide = torch.randn(2, 333, 4096, device=DEVICE, dtype=BF16)
    x, behind = wide[..., :1024], wide[..., 1024:]
    made = {
        "plain": lambda: plain(behind),
        "gelu": lambda: gelu(behind),
        "concat": lambda: concat_gelu(x, behind[..., :2048]),
    }[kind]()
    x = made.value().flatten(0, 1)
    want = called(module, x)
    assert_accurate(want, x, module)
    # The kernels do not round what GELU gives: some codes fall to the other side of a tie.
    apart = called(module, made).double() - want.double()
    assert apart.norm() < 0.06 * want.double().norm()


def test_some_outputs_of_a_site(monkeypatch):
    module, x = random_linear(spec_of("rms", 2240, 1088)), inputs(64, 2240)
    monkeypatch.setattr(ops, "choose", lambda *_: PLAN)
    whole = module(x)
    assert_same(module(x, rows=slice(64, 576)), whole[:, 64:576])
    assert_same(module(x), whole)  # whatever was recorded of the first call
    again = torch.randn_like(x)
    assert_same(module(again), called(module, again))


def test_later_calls_repeat_the_launches_of_the_first(monkeypatch):
    launched, real = [], Config.launch

    def launch(self, grid, *arguments):
        launched.append(self.kernel.__name__)
        real(self, grid, *arguments)

    recorder.forget()
    monkeypatch.setattr(ops, "choose", lambda *_: PLAN)
    monkeypatch.setattr(Config, "launch", launch)
    module = random_linear(spec_of("rms", 3072, 3072))
    for number in range(3):
        x = inputs(600, 3072) * (1 + number)
        want = called(module, x)
        launched.clear()
        assert_same(module(x), want)
        assert bool(launched) == (number == 0)
    recorder.forget()


def test_in_a_graph():
    """Compiled and loaded by the first call; its replay reads new inputs and moved weights."""
    module, x = random_linear(spec_of("rms", 3072, 3072)), inputs(600, 3072)
    called(module, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = called(module, x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        module.bias.copy_(torch.randn_like(module.bias))
        graph.replay()
        assert_same(y, called(module, x))


def test_beside_each_other():
    """Few rows, whose products split sums between programs that wait for each other."""
    module, x = random_linear(spec_of("rms", 3072, 3072)), inputs(33, 3072)
    want = called(module, x)
    streams = [torch.cuda.Stream() for _ in range(4)]
    found = []
    torch.cuda.synchronize()
    for _, stream in itertools.product(range(50), streams):
        with torch.cuda.stream(stream):
            found.append(called(module, x))
    torch.cuda.synchronize()
    for y in found:
        assert_same(y, want)
