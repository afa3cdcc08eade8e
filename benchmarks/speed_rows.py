"""What `make bench-kernels` measures: one function per op, a row per case and contestant.

Letters: M rows, D channels, K main-branch width, N outputs, R rank.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dirotq.benchmarks import norm_rope_rows, rivals
from dirotq.benchmarks.linear_cases import LINEARS
from dirotq.benchmarks.speed_table import OURS, Row
from dirotq.kernels import engine, transform_quantize, unpack_w4, w4a4_linear, w4a16_linear
from dirotq.kernels.buffers import Codes, Repacked, Unpacked
from dirotq.kernels.case import Case
from dirotq.kernels.chip import capability
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.linear import QuantLinear
from dirotq.kernels.plan import Plan, candidates_for, name_of
from dirotq.kernels.prologue import plain
from dirotq.tuning.fastest import call
from dirotq.tuning.random_linear import (
    Checker,
    random_linear,
    random_rows,
    read_bytes,
    spec_for,
)
from dirotq.tuning.timing import Timing, copies, time_calls

Call = Callable[[], object]
Make = Callable[[QuantLinear, Tensor], Call]
"""What is timed, on a linear and an input of its own."""
Contestant = Callable[[Case], tuple[str, str, Timing] | None]
"""Names and times another way to run a case, with its plan; None: there is none here."""
Scratch = Unpacked | Repacked | None
"""Weights as a plan's product reads them; None: as they are packed."""
FLOOR, BF16 = "floor", "bf16"
LEVELS = f"{OURS}, levels"
"""The same with weights in LM4: what it costs beside INT4."""


def linears() -> Iterator[Row]:
    """Time whole linears: ours, cuBLAS bf16, FP8 with per-row scales, plain W4A16; and ours by the
    products of two libraries, whichever the plan is."""
    libraries = [functools.partial(_by_engine, name) for name in ("humming", "scaled_mm")]
    others: list[Contestant] = [functools.partial(_levels, "w4a4"), _fp8, _w4a16, *libraries]
    for case in LINEARS:
        yield from _against_bf16("linear", case, "w4a4", others)


def few_rows() -> Iterator[Row]:
    for case in w4a16_linear.CASES:
        yield from _against_bf16("w4a16", case, "w4a16", [functools.partial(_levels, "w4a16")])


def gemms() -> Iterator[Row]:
    """Time what follows the codes, against cuBLAS bf16."""
    for case in w4a4_linear.CASES:
        base = _bf16(case)
        yield _row("gemm", case, BF16, base)
        for who in (OURS, LEVELS):
            linear, x = _checked("w4a4", case, who)
            plan = linear.plan(case.m)
            size = read_bytes(linear) + case.m * linear.spec.width
            ours = _time(functools.partial(product, plan), linear, x, size)
            yield _row("gemm", case, who, ours, plan=name_of(plan), ratio=base.p50 / ours.p50)


def transforms() -> Iterator[Row]:
    """Time codes, scales and c of activations, against reading two bytes and writing one."""
    for case in transform_quantize.CASES:
        linear, x = _checked("w4a4", case)
        plan = linear.plan(case.m)
        ours = _time(functools.partial(quantized, plan), linear, x, 2 * x.numel())
        yield from _against_memory("transform_quantize", case, ours, 3 * x.numel(), plan)


def unpacks() -> Iterator[Row]:
    """Time nibbles into scratch, with appended columns, against reading ½ byte and writing 1."""
    for case in unpack_w4.CASES:
        for who in (OURS, LEVELS):
            linear, x = _checked("w4a4", replace(case, m=64), who)
            plan = linear.plan(case.m)
            size = linear.qweight.numel()
            ours = _time(functools.partial(unpacking, plan), linear, x, size)
            yield from _against_memory("unpack_w4", case, ours, 3 * size, plan, who)


def norms_and_rotations() -> Iterator[Row]:
    yield from norm_rope_rows.rows(bandwidth())


def memory() -> Iterator[Row]:
    """Count bytes at rest against bf16; at r = 64 a square linear of 3072 is at 0.25 + 0.042."""
    for case in {(c.k, c.n): c for c in LINEARS}.values():
        for kind in ("w4a4", "w4a16"):
            linear = QuantLinear(spec_for(kind, case.k, case.n), bias=True, device="meta")
            name = f"{case.name} {case.k} -> {case.n}" + (" (W4A16)" if kind == "w4a16" else "")
            reach = 0.29 if kind == "w4a4" and case.name.startswith("FLUX") else None
            ratio = read_bytes(linear) / (2 * (case.n * case.k + case.n))
            yield Row(op="memory", case=name, contestant=OURS, ratio=ratio, reach=reach)


def parts() -> Iterator[Row]:
    """Time the FLUX qkv site without one thing at a time, and each thing alone."""
    case = LINEARS[0]
    linear, x = _checked("w4a4", case)
    bare, _ = _checked("w4a4", replace(case, rank=0))
    plan = linear.plan(case.m)
    variants: dict[str, tuple[Make, QuantLinear]] = {
        "whole linear": (functools.partial, linear),
        "without protected branch (r = 0)": (functools.partial, bare),
        "without transform and quantization": (functools.partial(product, plan), linear),
        "without unpacking": (functools.partial(on_unpacked, plan), linear),
        "transform and quantization alone": (functools.partial(quantized, plan), linear),
        "unpacking alone": (functools.partial(unpacking, plan), linear),
        "product alone": (functools.partial(product_alone, plan), linear),
    }
    whole: Timing | None = None
    for name, (make, module) in variants.items():
        timing = _time(make, module, x, read_bytes(module) + 2 * x.numel())
        whole = whole or timing
        row = _row("parts", case, OURS, timing, plan=name_of(plan), ratio=timing.p50 / whole.p50)
        yield replace(row, case=f"{name}, {case}", reach=None, stretch=None)


MEASURES: dict[str, Callable[[], Iterator[Row]]] = {
    "linear": linears,
    "gemm": gemms,
    "transform_quantize": transforms,
    "unpack_w4": unpacks,
    "w4a16": few_rows,
    "norm_rope": norms_and_rotations,
    "memory": memory,
    "parts": parts,
}


def quantized(plan: Plan, linear: QuantLinear, x_MD: Tensor) -> Callable[[], Codes]:
    """Return the first half of a linear, as the plan wants it."""
    return lambda: engine.quantize(plan, plain(x_MD[None]), linear.packed(), linear.spec)


def unpacked(plan: Plan, linear: QuantLinear) -> Scratch:
    """Fill the scratch that the plan wants."""
    if plan.engine == "packed":
        return None
    weights = engine.allocate(plan, linear.packed())
    engine.unpack(plan, linear.packed(), linear.spec, weights)
    return weights


def multiplied(plan: Plan, linear: QuantLinear, codes: Codes, weights: Scratch) -> Tensor:
    return engine.multiply(plan, codes, linear.packed(), weights, linear.spec, torch.bfloat16)


def product(plan: Plan, linear: QuantLinear, x_MD: Tensor) -> Call:
    """Return the second half of a linear, on codes at hand."""
    codes = quantized(plan, linear, x_MD)()
    return lambda: multiplied(plan, linear, codes, unpacked(plan, linear))


def product_alone(plan: Plan, linear: QuantLinear, x_MD: Tensor) -> Call:
    codes, weights = quantized(plan, linear, x_MD)(), unpacked(plan, linear)
    return lambda: multiplied(plan, linear, codes, weights)


def on_unpacked(plan: Plan, linear: QuantLinear, x_MD: Tensor) -> Call:
    """Return a whole linear, on weights unpacked before."""
    weights = unpacked(plan, linear)
    return lambda: multiplied(plan, linear, quantized(plan, linear, x_MD)(), weights)


def unpacking(plan: Plan, linear: QuantLinear, x_MD: Tensor) -> Call:
    return lambda: (unpacked(plan, linear),)


def _against_bf16(op: str, case: Case, kind: str, others: list[Contestant]) -> Iterator[Row]:
    linear, x = _checked(kind, case)
    base = _bf16(case)
    yield _row(op, case, BF16, base)
    ours = _time(functools.partial, linear, x, read_bytes(linear) + 2 * x.numel())
    plan = name_of(linear.plan(case.m))
    yield _row(op, case, OURS, ours, plan=plan, ratio=base.p50 / ours.p50)
    for name, plan, timing in filter(None, (other(case) for other in others)):
        row = _row(op, case, name, timing, plan=plan, ratio=base.p50 / timing.p50)
        yield replace(row, reach=None, stretch=None)


def _against_memory(
    op: str, case: Case, ours: Timing, traffic: int, plan: Plan, who: str = OURS
) -> Iterator[Row]:
    floor = traffic / bandwidth() * 1e6
    if who == OURS:
        yield _row(op, case, FLOOR, Timing(floor, floor, floor))
    yield _row(op, case, who, ours, plan=name_of(plan), ratio=ours.p50 / floor)


def _row(
    op: str, case: Case, who: str, t: Timing, *, plan: str = "", ratio: float | None = None
) -> Row:
    wanted = {"reach": case.reach, "stretch": case.stretch} if who == OURS else {}
    return Row(
        op=op, case=str(case), contestant=who, plan=plan,
        us_p20=t.p20, us_p50=t.p50, us_p80=t.p80, ratio=ratio, **wanted,
    )  # fmt: skip


def _time(make: Make, linear: QuantLinear, x: Tensor, bytes_per_call: int) -> Timing:
    count = copies(bytes_per_call)
    return time_calls([make(copy.deepcopy(linear), x.clone()) for _ in range(count)])


def _checked(kind: str, case: Case, who: str = OURS) -> tuple[QuantLinear, Tensor]:
    """Make a linear and its input. Raises RuntimeError if its plan computes something else."""
    spec = spec_for(kind, case.k, case.n, case.rank)
    linear = random_linear(of_levels(spec) if who == LEVELS else spec)
    x = random_rows(case.m, case.k)
    if problem := Checker(linear, x).problem(linear(x)):
        raise RuntimeError(f"{case}, {name_of(linear.plan(case.m))}: {problem}")
    return linear, x


def of_levels(spec: QuantSpec) -> QuantSpec:
    """Return a spec with INT4 weights with LM4's in their place."""
    return replace(spec, weights=replace(spec.weights, element="lm4"))


def _levels(kind: str, case: Case) -> tuple[str, str, Timing]:
    linear, x = _checked(kind, case, LEVELS)
    timing = _time(functools.partial, linear, x, read_bytes(linear) + 2 * x.numel())
    return LEVELS, name_of(linear.plan(case.m)), timing


def _bf16(case: Case) -> Timing:
    weight, bias = _weights(case)
    size = 2 * (weight.numel() + case.m * case.k)
    return time_calls(
        [
            functools.partial(rivals.bf16(weight.clone(), bias), random_rows(case.m, case.k))
            for _ in range(copies(size))
        ]
    )


def _fp8(case: Case) -> tuple[str, str, Timing]:
    weight, bias = _weights(case)
    x = random_rows(case.m, case.k)
    want = rivals.bf16(weight, bias)(x).float()
    error = (rivals.fp8_per_row(weight, bias)(x).float() - want).norm() / want.norm()
    if not error < 0.1:
        raise RuntimeError(f"{case}, {rivals.fp8_name()}: wrong result, relative error {error:.2g}")
    count = copies(weight.numel() + 2 * x.numel())
    calls = [functools.partial(rivals.fp8_per_row(weight, bias), x.clone()) for _ in range(count)]
    return rivals.fp8_name(), "", time_calls(calls)


def _w4a16(case: Case) -> tuple[str, str, Timing]:
    linear, x = _checked("w4a16", case)
    timing = _time(functools.partial, linear, x, read_bytes(linear) + 2 * x.numel())
    return "W4A16, groups of 64", name_of(linear.plan(case.m)), timing


def _by_engine(name: str, case: Case) -> tuple[str, str, Timing] | None:
    linear = random_linear(spec_for("w4a4", case.k, case.n, case.rank))
    x = random_rows(case.m, case.k)
    chip = capability(x.device)
    found = [] if chip is None else candidates_for(chip, case.m, case.n, linear.spec, x.dtype)
    plan = next((plan for plan in found if plan.engine == name), None)
    if plan is None:
        return None
    if problem := Checker(linear, x).problem(call(plan, linear, x)()):
        raise RuntimeError(f"{case}, {name}: {problem}")
    timing = _time(functools.partial(call, plan), linear, x, read_bytes(linear) + 2 * x.numel())
    return f"{OURS}, {name}", name_of(plan), timing


def _weights(case: Case) -> tuple[Tensor, Tensor]:
    new = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    return new(case.n, case.k), new(case.n)


@functools.cache
def bandwidth() -> float:
    """Return bytes per second that a kernel moves which reads and writes 1 GiB each.

    A kernel, not a copy: the copy engine, which a graph would use, is slower.
    """
    source = torch.randn(2**29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    call = functools.partial(torch.neg, source, out=target)
    return 4 * source.numel() / (time_calls([call] * 4).p50 * 1e-6)
