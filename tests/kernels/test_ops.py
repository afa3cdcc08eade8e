"""``torch.ops.dirotq.quant_linear``: one operator; the plan is chosen when it runs."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from formats import DEVICE
from tiny_packed import packed
from tiny_spec import FP4, tiny_spec
from torch import Tensor, nn

from dirotq.kernels import chip, engine, ops, plan
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.plan import Plan

SPECS = {
    "pow2": tiny_spec(rank=8, block=16, act_scale="pow2"),
    "groups": tiny_spec(rank=8, block=64, weight_scale="group", act_scale="group"),
    "dense": tiny_spec(rank=16, transform="dense"),
    "w4a16": tiny_spec(act_bits=16, weight_scale="group"),
    "nvfp4": tiny_spec(**FP4["nvfp4"], rank=8),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
BUFFERS = ("qweight", "wscale", "wglobal", "basis", "rotation", "wp", "bias")


def arguments(spec: QuantSpec, x: Tensor, *, bias: bool = True) -> tuple:
    module = packed(spec, bias=bias).to(x.device)
    return x, *(getattr(module, name) for name in BUFFERS), ops.format_key(spec)


@every_spec
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 64), (0, 64), (64,)], ids=str)
def test_opcheck(spec, shape):
    x = torch.randn(shape, device=DEVICE)
    torch.library.opcheck(ops.quant_linear, arguments(spec, x))
    torch.library.opcheck(ops.quant_linear, arguments(spec, x, bias=False))


@every_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fake_has_the_real_ones_shape_dtype_and_device(spec, dtype):
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = packed(spec).to(DEVICE)
    real = module(torch.randn(2, 7, 64, device=DEVICE, dtype=dtype))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = module(torch.empty(2, 7, 64, device=DEVICE, dtype=dtype))
    assert (fake.shape, fake.dtype, fake.device, fake.stride()) == (
        real.shape, real.dtype, real.device, real.stride(),
    )  # fmt: skip


@every_spec
def test_works_on_meta(spec):
    y = packed(spec).to("meta")(torch.empty(3, 64, device="meta"))
    assert y.device.type == "meta"
    assert y.shape == (3, 48)


def test_a_spec_survives_being_an_argument_and_tensors():
    for spec in SPECS.values():
        known = ops.spec_of(ops.format_key(spec), spec.in_features, spec.outputs, spec.rank)
        assert known == replace(spec, out_features=(spec.outputs,))


@every_spec
@pytest.mark.parametrize("rows", [(0, 16), (8, 40), (0, 48)], ids=str)
def test_some_rows_are_those_of_all(spec, rows):
    module, x = packed(spec).to(DEVICE), torch.randn(2, 5, 64, device=DEVICE)
    torch.testing.assert_close(module(x, rows=slice(*rows)), module(x)[..., slice(*rows)])


def test_a_prologue_is_computed_first():
    spec = SPECS["pow2"]
    x, *more = arguments(spec, torch.randn(2, 5, 64))
    want = ops.quant_linear(torch.nn.functional.gelu(x, approximate="tanh"), *more)
    torch.testing.assert_close(ops.quant_linear(x, *more, prologue="gelu"), want)
    first, behind = x[..., :48], x[..., 48:]
    joined = torch.cat([first, torch.nn.functional.gelu(behind, approximate="tanh")], -1)
    got = ops.quant_linear(first, *more, prologue="concat", behind=behind)
    torch.testing.assert_close(got, ops.quant_linear(joined, *more))
    with pytest.raises(ValueError, match="prologue 'relu' is unknown"):
        ops.quant_linear(x, *more, prologue="relu")


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64)])
def test_no_rows(shape):
    module = packed(SPECS["pow2"]).to(DEVICE)
    assert module(torch.zeros(shape, device=DEVICE)).shape == (*shape[:-1], 48)


def test_any_batch_and_any_strides():
    module, x = packed(SPECS["pow2"]), torch.randn(6, 2, 4, 64)
    whole = module(x)
    assert whole.is_contiguous()
    torch.testing.assert_close(module(x.transpose(0, 2)), whole.transpose(0, 2))
    torch.testing.assert_close(module(x[::2, :, 1]), whole[::2, :, 1])
    torch.testing.assert_close(module(x[:1, :1, :1].expand(3, 2, 2, 64))[2, 1, 1], whole[0, 0, 0])
    torch.testing.assert_close(module(torch.stack([x, x], -1)[..., 0]), whole)


class Block(nn.Module):
    """Two packed linears and what stands between them."""

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.up, self.down = packed(spec), packed(spec, seed=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.pad(torch.relu(self.up(x)), (0, 16))
        return x[..., :48] + self.down(y)


@every_spec
def test_compiled_as_one_graph(spec):
    torch._dynamo.reset()
    block, x = Block(spec), torch.randn(2, 5, 64)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))


def test_rows_may_change_without_compiling_again():
    torch._dynamo.reset()
    seen = []

    def backend(graph: torch.fx.GraphModule, _) -> torch.fx.GraphModule:
        seen.append([n.target for n in graph.graph.nodes if n.op == "call_function"])
        return graph

    block = Block(SPECS["pow2"])
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for rows in (5, 7, 33, 2, 90, 1, 64):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(compiled(x), block(x))
    # One for the first size, one for all others, one for a single row (which torch specializes).
    assert len(seen) <= 3
    assert all(sum("quant_linear" in str(t) for t in targets) == 2 for targets in seen)


def test_a_compiled_module_follows_its_weights():
    torch._dynamo.reset()
    block, x = Block(SPECS["pow2"]), torch.randn(5, 64)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    block.down.wscale.mul_(2)
    assert not torch.allclose(compiled(x), before)
    torch.testing.assert_close(compiled(x), block(x))


def test_a_deep_copy_runs_on_its_own():
    block, x = Block(SPECS["pow2"]), torch.randn(5, 64)
    twin = copy.deepcopy(block)
    want = block(x)
    assert torch.equal(twin(x), want)
    twin.up.wscale.zero_()
    assert torch.equal(block(x), want)
    assert twin.up.spec == block.up.spec


def test_a_saved_state_runs_in_another_module():
    module, x = packed(SPECS["pow2"]), torch.randn(5, 64)
    other = packed(SPECS["pow2"], seed=9)
    assert not torch.allclose(other(x), module(x))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


def test_the_plan_is_chosen_by_the_rows_of_the_call(monkeypatch):
    asked = []

    def choose(chip: int | None, m: int, n: int, spec: QuantSpec, dtype: torch.dtype) -> Plan:
        asked.append((chip, m, n, spec, dtype))
        return Plan(engine="reference", container="none")

    monkeypatch.setattr(ops, "choose", choose)
    module = packed(SPECS["pow2"])
    module(torch.randn(2, 7, 64))
    module(torch.randn(1, 64, dtype=torch.float16), rows=slice(8, 40))
    whole, part = (replace(SPECS["pow2"], out_features=(n,)) for n in (48, 32))
    assert asked == [(None, 14, 48, whole, torch.float32), (None, 1, 32, part, torch.float16)]


@pytest.fixture
def nothing_said():
    """As in a process that has not logged a line yet."""
    chip.say_once.cache_clear()
    yield
    chip.say_once.cache_clear()


def test_a_cpu_takes_the_reference_path_and_says_so_once(caplog, nothing_said):
    module, x = packed(SPECS["pow2"]), torch.randn(5, 64)
    with caplog.at_level(logging.INFO, logger=chip.log.name):
        y = module(x)
        module(x)
    assert module.plan(5).engine == "reference"
    want = engine.reference(x, module.packed(), module.spec)
    assert torch.equal(y, want)
    # Expected on a CPU, so no warning.
    assert [(r.levelname, "reference path" in r.message) for r in caplog.records] == [
        ("INFO", True)
    ]
    assert "the kernels need an NVIDIA GPU" in caplog.text


@pytest.mark.filterwarnings("ignore:dirotq..quant_linear:UserWarning")  # torch says it first
def test_a_gradient_is_refused_when_somebody_asks_for_it():
    module, x = packed(SPECS["pow2"]), torch.randn(5, 64, requires_grad=True)
    y = module(x)
    torch.testing.assert_close(y, module(x.detach()))
    with pytest.raises(RuntimeError, match="no gradient"):
        y.sum().backward()
    with torch.no_grad():
        assert not module(x).requires_grad


def test_a_parametrized_module_is_read_by_its_attributes():
    class Doubled(nn.Module):
        def forward(self, wscale: Tensor) -> Tensor:
            return 2 * wscale

    module, x = packed(SPECS["w4a16"], bias=False), torch.randn(5, 64)
    want = 2 * module(x)
    torch.nn.utils.parametrize.register_parametrization(module, "wscale", Doubled())
    torch.testing.assert_close(module(x), want)


class Refusing:
    """An engine on a chip that is not here: its compiler refuses some plans."""

    def __init__(self, monkeypatch, error: Exception, refused: int) -> None:
        self.error, self.refused, self.tried = error, refused, []
        plan._refused.cache_clear()
        plan.renew()
        monkeypatch.setattr(ops, "capability", lambda device: 90)
        monkeypatch.setattr(ops.engine, "linear", self)

    def __call__(self, chosen: Plan, x, packed, spec: QuantSpec, last: int) -> Tensor:
        assert last == 0
        self.tried.append(str(chosen.engine))
        if chosen.engine != "reference" and len(self.tried) <= self.refused:
            raise self.error
        return engine.reference(x.value().flatten(0, 1), packed, spec)


@pytest.fixture
def forgetting():
    yield
    plan._refused.cache_clear()
    plan.renew()


@pytest.mark.parametrize("refused", [1, 2, 10_000])
def test_a_plan_that_does_not_compile_gives_way_to_the_next(
    monkeypatch, caplog, nothing_said, forgetting, refused
):
    from triton.runtime.errors import OutOfResources

    module, x = packed(SPECS["pow2"]), torch.randn(300, 64).bfloat16()
    want = engine.reference(x, module.packed(), module.spec)
    there = Refusing(monkeypatch, OutOfResources(300_000, 232_448, "shared memory"), refused)
    assert torch.equal(module(x), want)
    tried = len(there.tried)
    assert tried == refused + 1 if refused < 10 else there.tried[-1] == "reference"
    assert len(set(there.tried[:2])) <= 2 and "shared memory" in caplog.text
    assert torch.equal(module(x), want)
    assert len(there.tried) == tried + 1  # the next call knows
    if refused == 10_000:
        chosen = plan.choose(90, 300, 48, replace(module.spec, out_features=(48,)), x.dtype)
        assert "no kernel compiles here: OutOfResources" in chosen.why


def test_other_errors_are_no_reason_to_choose_anew(monkeypatch, forgetting):
    there = Refusing(monkeypatch, RuntimeError("CUDA error: out of memory"), 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        packed(SPECS["pow2"])(torch.randn(300, 64).bfloat16())
    assert len(there.tried) == 1
