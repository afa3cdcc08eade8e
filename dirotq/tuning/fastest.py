"""Time every plan of a linear on the GPU, after a look at its result; the fastest wins."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dirotq.kernels import engine
from dirotq.kernels.formats import activation
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.linear import QuantLinear
from dirotq.kernels.measured import Entry
from dirotq.kernels.plan import Plan, candidates_for, choose, kind_of, name_of

from .random_linear import Checker, random_linear, random_rows, read_bytes
from .timing import Timing, copies, time_calls

Timed = list[tuple[Plan, Timing]]
"""Plans of a shape with their times, fastest first."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A linear on M rows. Of two with one :attr:`key`, one is measured."""

    spec: QuantSpec
    m: int

    @classmethod
    def of(cls, spec: QuantSpec, m: int) -> "Shape":
        """Make a shape of a linear: 8-bit floats have the products and the rows of 4-bit codes."""
        if spec.activations.element == "e4m3":
            spec = replace(spec, activations=activation.recorded_format(4, "rms", 16))
        return cls(spec, m)

    @property
    def key(self) -> tuple[str, int, int, int]:
        """What a table knows of it: kind, m, n and k."""
        return kind_of(self.spec), self.m, self.spec.outputs, self.spec.width

    def __str__(self) -> str:
        kind, m, n, k = self.key
        return f"{kind} {k} -> {n}, M = {m}"


def plans(shape: Shape, chip: int) -> list[Plan]:
    """List candidates worth timing: none whose tile is far taller or far lower than the rows."""
    m, n, spec = shape.m, shape.spec.outputs, shape.spec
    if choose(chip, m, n, spec, torch.bfloat16).engine == "reference":
        return []
    found = candidates_for(chip, m, n, spec, torch.bfloat16)
    low, high = min(m, 1024) / 16, max(32, 2 * m)
    return [p for p in found if p.tile is None or low <= p.tile.bm <= high]


def race(shape: Shape, candidates: Sequence[Plan], failed: Callable[[Plan, str], object]) -> Timed:
    """Time every candidate that runs and gives the right result; fastest first.

    failed  is told of every other, with the reason

    Raises torch.OutOfMemoryError if the linear does not fit the GPU's memory, RuntimeError if a
    kernel broke the GPU's context: nothing after it would count.
    """
    linear = random_linear(shape.spec)
    x = random_rows(shape.m, shape.spec.in_features)
    checker = Checker(linear, x)
    count = copies(read_bytes(linear) + 2 * x.numel())
    # Only tensors differ from copy to copy: what they hold is the same.
    data = [(linear, x)] + [(_clone(linear), x.clone()) for _ in range(count - 1)]
    timed: Timed = []
    for plan in candidates:
        try:
            if problem := checker.problem(call(plan, linear, x)()):
                failed(plan, problem)
                continue
            best = min((t.p50 for _, t in timed), default=math.inf)
            timing = time_calls([call(plan, *own) for own in data], repeats=7, limit=1.3 * best)
        except Exception as error:  # noqa: BLE001 - compilers raise anything
            failed(plan, f"{type(error).__name__}: {str(error).strip()[-200:]}")
            _refuse_lost_context(f"{name_of(plan)} on {shape}")
            continue
        timed.append((plan, timing))
    return sorted(timed, key=lambda pair: pair[1].p50)


def call(plan: Plan, linear: QuantLinear, x: Tensor) -> Callable[[], Tensor]:
    return partial(engine.linear, plan, x, linear.packed(), linear.spec)


def entries(shape: Shape, timed: Timed) -> list[Entry]:
    """Return a table's rows of a shape: the fastest plan, and the fastest for calls that can't take
    that: fp16 has no library's products, 8-bit floats have no INT8 codes, and not everybody has the
    package of ``humming``."""
    _, m, n, k = shape.key
    found: dict[str, Entry] = {}
    libraries: tuple[tuple[str, ...], ...] = (), ("humming",), ("humming", "scaled_mm")
    for floats, lacking in itertools.product((False, True), libraries):
        for plan, timing in timed:
            if plan.engine in lacking or (floats and plan.container == "int8"):
                continue
            row = {"m": m, "n": n, "k": k, "plan": name_of(plan), "us": round(timing.p50, 1)}
            found.setdefault(name_of(plan), row)
            break
    return list(found.values())


def _refuse_lost_context(what: str) -> None:
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise RuntimeError(f"{what} broke the GPU's context ({error})") from error


def _clone(linear: QuantLinear) -> QuantLinear:
    twin = QuantLinear(linear.spec, bias=linear.bias is not None, device="cuda")
    twin.load_state_dict(linear.state_dict())
    return twin
