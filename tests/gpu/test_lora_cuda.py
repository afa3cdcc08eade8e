"""Low-rank updates in the kernels of a real GPU, behind graphs and the compiler."""

import copy
from dataclasses import replace

import pytest
import torch
from formats import DEVICE, inputs, random_linear, spec_of
from listed_updates import Adapter
from packed_flux import arguments, build, run
from torch import Tensor

import dirotq
from dirotq.kernels import engine
from dirotq.kernels.chip import capability
from dirotq.kernels.directions import Part
from dirotq.kernels.linear import QuantLinear
from dirotq.kernels.plan import candidates_for, name_of
from dirotq.runtime.graphs import graph_forward, ungraph_forward

pytest.importorskip("triton")

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600), pytest.mark.usefixtures("full_float32")]

CHIP = capability(DEVICE) or 90
RANK, WIDTH, ROWS = 32, 2240, (slice(0, 336), slice(336, 672), slice(672, 1008))
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def update(rows: slice, width: int, seed: int, scale: float = 1.0) -> Part:
    draw = torch.Generator().manual_seed(seed)
    down = torch.randn(RANK, width, generator=draw) / width**0.5
    up = torch.randn(rows.stop - rows.start, RANK, generator=draw)
    return Part(rows, down.bfloat16().to(DEVICE), up.bfloat16().to(DEVICE), scale)


def adapted(name: str, *, shared: bool = False) -> tuple[QuantLinear, Adapter]:
    """As q, k and v: an update each, of one A or of one each."""
    linear = random_linear(spec_of(name, WIDTH, ROWS[-1].stop))
    parts = [update(rows, WIDTH, seed) for seed, rows in enumerate(ROWS)]
    if shared:
        parts = [part._replace(down=parts[0].down) for part in parts]
    adapter = Adapter(parts)
    linear.adapted().attach(adapter)
    linear.renew()
    return linear, adapter


def added(x: Tensor, parts: list[Part], outputs: int) -> Tensor:
    total = torch.zeros(len(x), outputs, dtype=torch.float64, device=x.device)
    for part in parts:
        product = x.double() @ part.down.double().T @ part.up.double().T
        total[:, part.rows] += part.scale * product
    return total


def assert_exact(got: Tensor, x: Tensor, linear: QuantLinear, parts: list[Part]) -> None:
    """Twice the error of plain torch in x's dtype, as without updates (test_kernels_cuda.py)."""
    base = engine.reference(x.double(), linear.packed(), linear.spec)
    more = added(x, parts, linear.spec.outputs)
    plain = engine.reference(x, linear.packed(), linear.spec).double() - base
    product = sum(
        (part.scale * (x @ part.down.to(x.dtype).T @ part.up.to(x.dtype).T)).double().norm() ** 2
        for part in parts
    )
    assert got.isfinite().all()
    error = (got.double() - base - more).norm()
    assert error < 2 * plain.norm() + 2.0**-7 * float(product) ** 0.5


FORMATS = ("pow2", "rms", "token-r0", "token", "groups", "w4a8", "w4a16", "w4a16-protected")
FORMATS += ("mxfp4", "nvfp4", "dense", "weight-groups")


@HALVES
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shared", [False, True])
def test_called(name, dtype, shared):
    linear, adapter = adapted(name, shared=shared)
    x = inputs(600, WIDTH, dtype)
    for _ in range(2):  # the second time, as recorded
        assert_exact(linear(x), x, linear, adapter.found)
    whole = linear(x).float()
    for rows in ROWS:
        got = linear(x, rows=rows).float()
        assert (got - whole[:, rows]).norm() < 0.02 * whole[:, rows].norm()
    few = torch.cat([linear(part) for part in x[:64].split(1)]).float()
    assert (few - whole[:64]).norm() < 0.02 * whole[:64].norm()


@pytest.mark.parametrize("name", ["pow2", "rms", "token"])
def test_every_plan(name):
    """Appended columns, both kinds of Triton products, and Humming where it is there."""
    linear, adapter = adapted(name)
    made = linear.updates.made
    packed = linear.packed()._replace(basis=made.down, wp=made.up)
    spec = replace(linear.spec, rank=packed.rank)
    x, seen = inputs(600, WIDTH), set()
    for plan in candidates_for(CHIP, 600, spec.outputs, linear.spec, torch.bfloat16):
        if (kind := (plan.engine, plan.container)) in seen:
            continue
        seen.add(kind)
        got = engine.linear(plan, x, packed, spec, packed.rank - linear.spec.rank)
        base = engine.reference(x.double(), linear.packed(), linear.spec)
        more = added(x, adapter.found, spec.outputs)
        plain = engine.reference(x, linear.packed(), linear.spec).double() - base
        error = (got.double() - base - more).norm()
        assert error < 2 * plain.norm() + 2.0**-7 * (base + more).norm(), name_of(plan)
        assert error < plain.norm() + 0.05 * more.norm(), name_of(plan)
    assert len(seen) > 1


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_sizes_that_fp8_columns_hold(size):
    linear, adapter = adapted("rms")
    adapter.found = [part._replace(up=part.up * size) for part in adapter.found]
    x = inputs(600, WIDTH)
    base = engine.reference(x.double(), linear.packed(), linear.spec)
    more = added(x, adapter.found, linear.spec.outputs)
    plain = engine.reference(x, linear.packed(), linear.spec).double() - base
    error = (linear(x).double() - base - more).norm()
    assert error < 2 * plain.norm() + 2.0**-6 * more.norm()


def adapters(network) -> list[Adapter]:
    found = []
    for seed, module in enumerate(network.modules()):
        if isinstance(module, QuantLinear):
            rows = slice(0, module.spec.outputs)
            part = update(rows, module.in_features, seed)
            found.append(Adapter([part]))
            module.adapted().attach(found[-1])
    return found


def scale(found: list[Adapter], value: float) -> None:
    for adapter in found:
        adapter.found = [part._replace(scale=value) for part in adapter.found]


def test_graphs_and_the_compiler_follow():
    """About twice the error of plain torch, against float64, and nothing is compiled again."""
    plain = build()
    exact, twin = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    call = arguments(1, 64, 1)
    doubles = {k: v.double() if isinstance(v, Tensor) else v for k, v in call.items()}
    networks = plain, exact, twin
    without, compiled = run(exact, **doubles), None
    every = [adapters(network) for network in networks]
    torch._dynamo.reset()
    dirotq.accelerate(twin, compile=True)
    graph_forward(twin)
    for value in (1.0, 1.5, 2.0, 0.0):
        for found in every:
            scale(found, value)
        want = run(exact, **doubles)
        # Further directions are rounded like the branch: by about 2^-7 of what they add.
        error = (run(plain, **call).double() - want).norm()
        allowed = 2 * error + 2.0**-6 * (want - without).norm()
        assert ((want - without).norm() > allowed) == (value > 0)
        for _ in range(3):
            assert (run(twin, **call).double() - want).norm() <= allowed
        now = sum(torch._dynamo.utils.counters["aot_autograd"].values())
        compiled = compiled or now
        assert now == compiled  # never again
    ungraph_forward(twin)
