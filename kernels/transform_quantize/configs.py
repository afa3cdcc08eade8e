"""The passes' configurations: launch shapes and constants, by the linear's spec and the chip."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..appended import TINY, appended_part
from ..build import CHIPS, Config, shared_bytes
from ..chip import chained, processors
from ..formats.lm4 import UNITS
from ..formats.spec import QuantSpec
from ..prologue import Kind
from . import passes, projection, scales
from .reference import POW2_CLIP, RMS_TOP

INTERPRETED = bool(triton.knobs.runtime.interpret)
DOTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ROWS = 16
"""Of a program of ``gather`` and of ``scale_rows``."""
ROUND_ROWS, ROUND_COLUMNS = 4, 512
"""Of a program of ``round_rows``."""
STEP = 64
"""Channels of a step of ``project``."""
LEAST_STAGES = 3
"""Of ``project``: rather than fewer, fewer programs share a multiprocessor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Rows per step, warps, pipeline stages, programs per multiprocessor."""

    bm: int = 64
    warps: int = 4
    stages: int
    per_sm: int = 1
    stacked: bool = False
    """``rotate``: the four tiles of x are one product's rows (passes.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    project: Shape
    rotate: Shape


_STACKED = Shape(stages=2, per_sm=2, stacked=True)
_HOPPER_PLAIN = Shapes(project=Shape(stages=5, per_sm=2), rotate=_STACKED)
_HOPPER = Shapes(project=Shape(stages=4, per_sm=3), rotate=_STACKED)
"""With GELU on the way in. Measured on an H100 and an H200 at FLUX's sizes."""

_WARPS = Shapes(project=Shape(stages=3, per_sm=2), rotate=Shape(stages=1, per_sm=2))
"""Where a product is a warp's: rows fill the warps, or each would compute GELU for all columns."""

_BLACKWELL = Shapes(project=Shape(bm=32, stages=3, per_sm=2), rotate=Shape(stages=2))
_BLACKWELL_PLAIN = replace(_BLACKWELL, rotate=Shape(bm=32, stages=2, per_sm=3))


def usual(kind: Kind, chip: int | None) -> Shapes:
    """Return the shapes for a prologue on compute capability ``chip``: on others than Hopper, by
    what their machine code shows."""
    if chip in (None, 90):
        return _HOPPER_PLAIN if kind == "plain" else _HOPPER
    if chip == 100:
        return _BLACKWELL_PLAIN if kind == "plain" else _BLACKWELL
    return _WARPS


def project(
    spec: QuantSpec,
    kind: Kind,
    chip: int | None,
    dtype: torch.dtype,
    shapes: Shapes,
    *,
    parts: int,
    beside: int,
    squares: bool,
    amax: bool,
) -> Config:
    """``beside``: last directions, which stay in z; ``squares``: it adds up x's squares; ``amax``:
    it zeroes each row's largest, if whole."""
    s, rp = shapes.project, width_of_c(spec.rank)
    if rp > 128:  # rows enough for Blackwell's own matrix memory: registers would not do
        s = replace(s, bm=64)
    each = 2 * STEP * (s.bm + rp)
    beside_others = shared_bytes(chip or CHIPS[-1]) // s.per_sm // each
    s = _within(replace(s, stages=min(s.stages, max(LEAST_STAGES, beside_others))), each, 0, chip)
    constants = _shared(spec, chip, dtype) | {
        "R": spec.rank, "LEAD": spec.rank - beside, "LP": width_of_c(spec.rank - beside),
        "EVEN": spec.in_features % STEP == 0,
        "BM": s.bm, "BK": STEP, "PARTS": parts, "SQUARES": squares, "AMAX": amax, "KIND": kind,
    }  # fmt: skip
    return Config(
        kernel=projection.project, constants=constants, warps=s.warps, stages=s.stages,
        early=chained(chip),
    )  # fmt: skip


def gather(spec: QuantSpec, chip: int | None, *, parts: int) -> Config:
    constants = {"RP": width_of_c(spec.rank), "PARTS": parts, "BM": ROWS, "CHAIN": chained(chip)}
    return Config(kernel=projection.gather, constants=constants, early=chained(chip))


def scale_rows(
    spec: QuantSpec,
    chip: int | None,
    columns: int | None,
    *,
    bias: bool,
    parts: int,
    beside: int,
) -> Config:
    """``columns``: appended ones, of which there may be 0; None: not asked for. c and the sums of
    squares come in so many ``parts``; ``beside`` as for :func:`project`."""
    constants = _scales(spec, columns, bias) | {
        "LEAD": spec.rank - beside, "PARTS": parts, "TOP": RMS_TOP, "BM": ROWS,
        "CHAIN": chained(chip),
    }  # fmt: skip
    return Config(kernel=scales.scale_rows, constants=constants, early=chained(chip))


def rotate(
    spec: QuantSpec,
    chip: int | None,
    dtype: torch.dtype,
    shapes: Shapes,
    *,
    channels: int,
    gelu: bool,
    protected: int,
    codes: bool,
) -> Config:
    """``channels`` of one part of x; ``protected``: first directions of c, which are projected out;
    ``codes``: not z, leave."""
    s, width, acts = shapes.rotate, tile(spec), spec.activations
    if width == 128:  # the same registers for twice the threads
        s = replace(s, warps=2 * s.warps, stacked=False)
    lead = width_of_c(protected) if protected else 0
    s = _within(s, 2 * s.bm * (4 * width + lead), 2 * width * (4 * lead + width), chip)
    rounding: dict[str, Any] = {"G": 0, "QMAX": 0, "LEVELS": 0, "CLIP": 0.0}
    if codes:
        group = acts.group_size or 1
        rounding = {"G": group, "QMAX": acts.largest, "LEVELS": acts.levels, "CLIP": POW2_CLIP}
    constants = _shared(spec, chip, dtype) | rounding | {
        "SUB": max(1, spec.transform.block // width), "PROJECT": protected > 0, "LP": max(lead, 16),
        "EVEN": channels % (4 * width) == 0, "BM": s.bm, "GELU": gelu, "STACKED": s.stacked,
    }  # fmt: skip
    return Config(
        kernel=passes.rotate, constants=constants, warps=s.warps, stages=s.stages,
        early=chained(chip) and protected > 0,
    )  # fmt: skip


def round_rows(spec: QuantSpec, chip: int | None, columns: int | None, *, bias: bool) -> Config:
    """``columns`` as for :func:`scale_rows`."""
    acts = spec.activations
    # It never chains behind library products, which the dense rotation and ``rms`` are.
    chain = chained(chip) and spec.transform.kind == "hadamard" and acts.statistic != "rms"
    rounding = "pow2" if acts.shifted else acts.granularity
    constants = _scales(spec, columns, bias) | {
        "SCALE": "float" if acts.element == "e4m3" else rounding, "G": acts.group_size or 64,
        "LEVELS": acts.levels, "CLIP": POW2_CLIP, "BM": ROUND_ROWS, "BW": ROUND_COLUMNS,
        "CHAIN": chain,
    }  # fmt: skip
    return Config(kernel=passes.round_rows, constants=constants, early=chain)


def _shared(spec: QuantSpec, chip: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return the constants of both big passes."""
    return {
        "B": min(spec.transform.block, tile(spec)), "W": tile(spec), "RP": width_of_c(spec.rank),
        "DOT": tl.float32 if INTERPRETED else DOTS[dtype], "CHAIN": chained(chip),
        "FAST": not INTERPRETED,
    }  # fmt: skip


def _scales(spec: QuantSpec, columns: int | None, bias: bool) -> dict[str, Any]:
    """Return the constants of who writes scales, and c behind the codes."""
    acts = spec.activations
    return {
        "R": spec.rank, "RP": width_of_c(spec.rank), "RT": max(appended_part(spec.rank, bias), 1),
        "APPENDED": columns is not None, "T": triton.next_power_of_2(columns) if columns else 0,
        "QMAX": acts.largest, "UNIT": 2.0**acts.levels, "TINY": TINY,
        "COUNTED": UNITS if columns is not None and spec.weights.element == "lm4" else 1,
    }  # fmt: skip


def _within(s: Shape, each: int, fixed: int, chip: int | None) -> Shape:
    """Return ``s`` with as many of its stages (``each`` bytes) as fit the chip's shared memory
    beside ``fixed`` bytes."""
    room = shared_bytes(chip or CHIPS[-1]) - fixed
    return replace(s, stages=max(1, min(s.stages, room // each)))


def parts(x_BTD: Tensor, d: int, s: Shape) -> tuple[int, int]:
    """Return into how many parts of how many columns ``project`` is cut, so as to fill the chip."""
    programs = x_BTD.shape[0] * triton.cdiv(x_BTD.shape[1], s.bm)
    steps = triton.cdiv(d, STEP)
    wanted = processors(x_BTD.device) * s.per_sm // max(programs, 1)
    part = triton.cdiv(steps, max(1, min(wanted, steps // 3)))
    return triton.cdiv(steps, part), part * STEP


def programs(x: Tensor, n_row: int, n_col: int, s: Shape, block: int) -> int:
    """Count ``rotate``'s: a multiple of the column blocks that fills the chip, at most one program
    per row block."""
    slots = processors(x.device) * (1 if block == 512 else s.per_sm)
    return n_col * max(1, min(n_row, slots // n_col))


def tile(spec: QuantSpec) -> int:
    """Return the columns of a tile of ``rotate``."""
    return 128 if spec.transform.block == 512 else 64


def tiles(spec: QuantSpec) -> int:
    """Count the tiles of the main branch."""
    return triton.cdiv(spec.in_features, tile(spec))


def width_of_c(rank: int) -> int:
    """Return the columns of c and of the basis in the kernels: a power of two."""
    return max(16, triton.next_power_of_2(rank))
