"""Which kernels run a packed linear: chosen per chip and shape, from measurements.

Measured tables (``kernels/measured.py``) hold the fastest candidate for some shapes on a chip; a
shape in between takes its nearest neighbour's (in log M, N, K). Chips that nobody measured take the
rules in :func:`unmeasured`. Letters: M rows, N outputs, K width.
"""

import functools
import math
from dataclasses import dataclass, fields, replace
from logging import INFO, WARNING
from typing import Literal

import torch

from . import measured
from .build import FP8_CHIPS
from .chip import say_once
from .formats.spec import QuantSpec
from .fp4_linear import tiles as fp4
from .humming_linear import library as humming
from .support import unsupported
from .w4a4_linear.tiles import TILES, Tile, Variant, fits
from .w4a16_linear import tiles as w4a16

INT8_FIRST = (89, 120, 121)
"""Chips whose default container is INT8. GeForce Ada and Blackwell sum FP8 products in FP32 at half
the rate of INT8 (RTX 4090: 330 of 661 TFLOP/s, NVIDIA's Ada whitepaper). L40S and L4 are sm_89 too
and do both at one rate (L40S: 733, data sheet): the number can't tell them apart, INT8 costs them
only cuBLAS's product, and ``dirotq tune`` measures both."""

Container = Literal["fp8", "int8", "none"]
Engine = Literal["reference", "scaled_mm", "packed", "unpacked", "w4a16", "fp4", "humming"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one linear runs.

    ``reference``  plain torch, the specification
    ``scaled_mm``  weights unpacked to FP8 scratch, ``torch._scaled_mm``, low-rank branch and bias
                   as appended FP8 columns (kernels/appended.py)
    ``packed``     Triton GEMM that decodes nibbles in registers, low-rank branch in 16 bits
    ``unpacked``   Triton GEMM on unpacked scratch, low-rank branch in 16 bits
    ``w4a16``      Triton, 16-bit activations
    ``fp4``        Triton on FP4 weights, by FP4 matrix units where the chip has them; activations
                   in FP4 or in 16 bits
    ``humming``    the package Humming, which decodes nibbles itself; the low-rank branch is added
                   to what it wrote
    """

    engine: Engine
    container: Container
    tile: Tile | w4a16.Tile | fp4.Tile | None = None
    why: str = ""

    @property
    def appended(self) -> bool:
        """Whether low-rank branch and bias are columns of the product."""
        return self.engine == "scaled_mm"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.container == "fp8" else torch.int8

    @property
    def rows(self) -> int:
        """Rows of the tile; 1 without one."""
        return self.tile.bm if self.tile is not None else 1

    def __str__(self) -> str:
        codes = "" if self.container == "none" else f" on {self.container.upper()} codes"
        shape = f", tile {self.tile.bm} x {self.tile.bn}" if self.tile is not None else ""
        return f"{self.engine}{codes}{shape} ({self.why})"


@functools.lru_cache(maxsize=4096)
def choose(chip: int | None, m: int, n: int, spec: QuantSpec, dtype: torch.dtype) -> Plan:
    """Return the plan for M rows and N outputs of a linear on a chip.

    chip   compute capability (90: 9.0), or None for what is no NVIDIA GPU
    dtype  of the input; float32 and float64 always take the reference path
    """
    if (why := unsupported(spec, chip, dtype)) or chip is None:
        return Plan(engine="reference", container="none", why=why or "")
    m = max(m, 1)
    found = {name_of(plan): plan for plan in candidates_for(chip, m, n, spec, dtype)}
    refused = {name: why for name in found if (why := _refused().get((chip, spec, name)))}
    candidates = {name: plan for name, plan in found.items() if name not in refused}
    if not candidates:
        why = f"no kernel compiles here: {next(iter(refused.values()))}"
        return Plan(engine="reference", container="none", why=why)
    rows = [row for row in measured.rows(chip, kind_of(spec)) if row.plan in candidates]
    if rows:
        want = (m, n, spec.width)
        near = min(rows, key=lambda row: _distance((row.m, row.n, row.k), want))  # the first such
        plan = candidates[near.plan]
        why = f"measured at {near.m} x {near.k} -> {near.n} {near.where}"
    else:
        plan = unmeasured(chip, m, list(candidates.values()))
        why = f"no measurement for sm_{chip}"
    if refused:
        why += f"; {', '.join(refused)} did not compile here"
    if rows and (lacking := _lacks_humming(chip, m, n, spec, dtype, near)):
        why += f"; humming was faster there: {lacking}"
    return replace(plan, why=why)


def takes_directions(chip: int | None, spec: QuantSpec, count: int) -> bool:
    """Tell whether a linear's kernels take ``count`` further directions as part of its branch.

    They stay in the main branch's input (kernels/updates.py). Otherwise torch adds their products.
    """
    fits = spec.transform.kind == "hadamard" and spec.rank + count <= spec.in_features
    return fits and unsupported(spec, chip) is None


def candidates_for(chip: int, m: int, n: int, spec: QuantSpec, dtype: torch.dtype) -> list[Plan]:
    """Every plan that can run this linear on this chip; none where it is unsupported."""
    if unsupported(spec, chip, dtype):
        return []
    if spec.weights.element == "e2m1":
        kind = fp4.variant(chip if spec.activations.bits < 16 else None)
        fitting = (t for t in fp4.TILES[kind] if fp4.fits(t, kind, chip, spec.width))
        return [Plan(engine="fp4", container="none", tile=tile) for tile in fitting]
    if spec.activations.bits == 16:
        kinds = ["few", "many"] + (["wide"] if chip in w4a16.WIDE_CHIPS else [])
        if m <= 4:
            kinds = ["row", *kinds]
        lm4 = spec.weights.element == "lm4"
        few = [
            t for kind in kinds for t in w4a16.TILES[kind]
            if (m > 16 or t.bm <= 16) and (not lm4 or w4a16.takes_tables(t))
        ]  # fmt: skip
        return [Plan(engine="w4a16", container="none", tile=tile) for tile in few]
    by_row = not _grouped(spec)
    library = dtype == torch.bfloat16 and n % 16 == 0  # what torch._scaled_mm takes
    variants: tuple[Variant, ...] = ("packed", "unpacked", "tma") if by_row else ("grouped",)
    found = []
    for container in containers(chip, spec):
        fp8 = container == "fp8"
        if fp8 and by_row and library and spec.transform.kind == "hadamard":
            found.append(Plan(engine="scaled_mm", container="fp8"))
        for variant in variants:
            engine: Engine = "packed" if variant in ("packed", "grouped") else "unpacked"
            for tile in TILES[variant]:
                if fits(tile, variant, chip, fp8=fp8):
                    found.append(Plan(engine=engine, container=container, tile=tile))
    if (
        humming.why_not(chip, m, n, spec, dtype) is None
    ):  # last: never what nothing was measured for
        found.append(Plan(engine="humming", container="int8"))
    return found


def containers(chip: int, spec: QuantSpec) -> tuple[Container, ...]:
    """Return the 8-bit types that can carry the codes on a chip, the default one first."""
    element = spec.activations.element
    if element == "int8" or chip < FP8_CHIPS[0]:
        return ("int8",)
    return ("int8", "fp8") if chip in INT8_FIRST and element != "e4m3" else ("fp8",)


def unmeasured(chip: int, m: int, candidates: list[Plan]) -> Plan:
    """Without measurements: the library's GEMM for many rows, small packed tiles for few; of the
    candidates' first container."""
    if candidates[0].engine == "w4a16":
        tile = w4a16.usual(m, chip)
        return next((plan for plan in candidates if plan.tile is tile), candidates[0])
    default = [plan for plan in candidates if plan.container == candidates[0].container]
    library = [plan for plan in default if plan.engine == "scaled_mm"]
    if library and m > 256:
        return library[0]
    few = [plan for plan in default if plan.engine in ("packed", "fp4")] or default
    return min(few, key=lambda plan: abs(math.log2(plan.rows) - math.log2(min(m, 128))))


def kind_of(spec: QuantSpec) -> str:
    """Linears whose measurements compare: ``w4a16``, ``w4a4-grouped``, ``w4a4-nvfp4``..."""
    if spec.weights.element == "e2m1":
        return f"w4a{spec.activations.bits}-{spec.weights.name}"
    if spec.activations.bits == 16:
        return "w4a16"
    bits = 8 if spec.activations.element == "int8" else 4  # e4m3: the same products
    return f"w4a{bits}" + ("-grouped" if _grouped(spec) else "")


def _grouped(spec: QuantSpec) -> bool:
    """Tell whether a row has more than one scale on either side."""
    return "group" in (spec.activations.granularity, spec.weights.granularity)


def name_of(plan: Plan) -> str:
    """Return the plan's name in the table."""
    if plan.tile is None:
        return plan.engine
    values = [getattr(plan.tile, field.name) for field in fields(plan.tile)]
    return "-".join(map(str, (plan.engine, plan.container, *values)))


def refuse(chip: int | None, spec: QuantSpec, plan: Plan, error: Exception) -> bool:
    """Choose without a plan for such linears from now on, if ``error`` says that its kernels can't
    be compiled or need more than the chip has; tell whether it does."""
    if chip is None or plan.engine == "reference" or not _by_compiler(error):
        return False
    reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    _refused()[chip, spec, name_of(plan)] = reason
    renew()
    say_once(f"{name_of(plan)} does not run on this GPU, another kernel does: {reason}", WARNING)
    return True


@functools.cache
def _refused() -> dict[tuple[int, QuantSpec, str], str]:
    """Return why a chip's compiler refused a plan, by its name; this process's."""
    return {}


def _by_compiler(error: Exception) -> bool:
    from triton.errors import TritonError

    passes = isinstance(error, RuntimeError) and "PassManager" in str(error)
    return isinstance(error, TritonError | humming.NotCompiledError) or passes


def renew() -> None:
    """Choose anew from now on: a table has changed."""
    measured.forget()
    choose.cache_clear()


def _lacks_humming(
    chip: int, m: int, n: int, spec: QuantSpec, dtype: torch.dtype, near: measured.Row
) -> str | None:
    """Say what alone keeps Humming from a shape where it won: its package, or weights of levels."""
    at = near.m, near.n, near.k
    won = any(
        row.plan == "humming" and (row.m, row.n, row.k) == at
        for row in measured.rows(chip, kind_of(spec))
    )
    if not won:
        return None
    if spec.weights.element == "lm4":
        integers = replace(spec, weights=replace(spec.weights, element="int4"))
        if humming.why_not(chip, m, n, integers, dtype) is not None:
            return None
        reason = "it reads integers itself, and these weights are levels (lm4)"
        say_once(f"Humming is left out: {reason}", INFO)
        return reason
    why = humming.why_not(chip, m, n, spec, dtype)
    return why if why == humming.missing() else None


def _distance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return sum(abs(math.log(x / y)) for x, y in zip(a, b, strict=True))
