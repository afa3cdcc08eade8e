"""What each pass is compiled from, by the linear's spec, launch shape and chip."""

from typing import Any

import torch
import triton
import triton.language as tl

from ..appended import TINY, appended_part
from ..build import Config
from ..chip import chained
from ..formats.spec import QuantSpec
from ..prologue import Kind
from . import passes, projection, scales
from .reference import POW2_CLIP, RMS_TOP
from .shapes import STEP, Shapes, project_shape, rotate_shape, tile, warps_of_row, width_of_c

INTERPRETED = bool(triton.knobs.runtime.interpret)
DOTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ROWS = 16
"""Of a program of ``gather`` and of ``scale_rows``."""
ROUND_ROWS, ROUND_COLUMNS = 4, 512
"""Of a program of ``round_rows``."""


def normalize(channels: int, *, squares: bool) -> Config:
    width = triton.next_power_of_2(channels)
    constants = {"SQUARES": squares, "BD": width}
    return Config(kernel=projection.normalize, constants=constants, warps=warps_of_row(width))


def project(
    spec: QuantSpec,
    kind: Kind,
    chip: int | None,
    dtype: torch.dtype,
    shapes: Shapes,
    *,
    parts: int,
    squares: bool,
    amax: bool,
) -> Config:
    """``squares``: it adds up x's squares; ``amax``: it zeroes each row's largest, if whole."""
    s = project_shape(shapes, spec.rank, chip)
    constants = _shared(spec, chip, dtype) | {
        "R": spec.rank, "EVEN": spec.in_features % STEP == 0, "BM": s.bm, "BK": STEP, "PARTS":
        parts, "SQUARES": squares, "AMAX": amax, "KIND": kind,
    }  # fmt: skip
    return Config(
        kernel=projection.project, constants=constants, warps=s.warps, stages=s.stages,
        early=chained(chip),
    )  # fmt: skip


def gather(spec: QuantSpec, chip: int | None, *, parts: int) -> Config:
    constants = {"RP": width_of_c(spec.rank), "PARTS": parts, "BM": ROWS, "CHAIN": chained(chip)}
    return Config(kernel=projection.gather, constants=constants, early=chained(chip))


def scale_rows(
    spec: QuantSpec, chip: int | None, columns: int | None, *, bias: bool, parts: int, squares: int
) -> Config:
    """``columns``: appended ones, of which there may be 0; None: not asked for. c comes in so many
    ``parts``, the sums of squares in so many ``squares``."""
    constants = _scales(spec, columns, bias) | {
        "PARTS": parts, "SQUARES": squares, "TOP": RMS_TOP, "BM": ROWS, "CHAIN": chained(chip),
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
    protected: bool,
    codes: bool,
) -> Config:
    """``channels`` of one part of x; ``protected``: c is projected out; ``codes``: not z, leave."""
    s = rotate_shape(shapes, spec.transform.block, spec.rank if protected else 0, chip)
    width, acts = tile(spec), spec.activations
    rounding: dict[str, Any] = {"G": 0, "QMAX": 0, "LEVELS": 0, "CLIP": 0.0}
    if codes:
        group = acts.group_size or 1
        rounding = {"G": group, "QMAX": acts.largest, "LEVELS": acts.levels, "CLIP": POW2_CLIP}
    constants = _shared(spec, chip, dtype) | rounding | {
        "SUB": max(1, spec.transform.block // width), "PROJECT": protected,
        "EVEN": channels % (4 * width) == 0, "BM": s.bm, "GELU": gelu, "STACKED": s.stacked,
    }  # fmt: skip
    return Config(
        kernel=passes.rotate, constants=constants, warps=s.warps, stages=s.stages,
        early=chained(chip) and protected,
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
    }  # fmt: skip
