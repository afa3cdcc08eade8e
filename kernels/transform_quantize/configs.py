"""The sweeps' configurations: what each is compiled from, by the linear's spec, shape and chip."""

from typing import Any

import torch
import triton
import triton.language as tl

from ..appended import TINY, appended_part
from ..build import CHIPS, Config
from ..chip import chained
from ..formats.spec import QuantSpec
from ..prologue import Kind
from . import projection, scales, sweeps
from .reference import POW2_CLIP, RMS_TOP
from .shapes import Sweep, Sweeps, project_sweep, rotate_sweep, tile, warps_of_row, width_of_c

INTERPRETED = bool(triton.knobs.runtime.interpret)
DOTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ROWS = 16
"""Of a program of ``gather`` and of ``scale_rows``."""


def normalize(channels: int, *, squares: bool) -> Config:
    width = triton.next_power_of_2(channels)
    return Config(
        kernel=projection.normalize,
        constants={"SQUARES": squares, "BD": width},
        warps=warps_of_row(width),
    )


def project(
    spec: QuantSpec,
    kind: Kind,
    chip: int | None,
    dtype: torch.dtype,
    chosen: Sweeps,
    *,
    parts: int,
    squares: bool,
    amax: bool,
) -> Config:
    """``squares``: it adds up x's squares; ``amax``: it zeroes each row's largest, if whole."""
    s = project_sweep(chosen, spec.rank, _memory(chip))
    constants = _shared(spec, chip, dtype) | {
        "R": spec.rank, "EVEN": spec.in_features % s.width == 0, "BM": s.bm, "BK": s.width, "PARTS":
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
    spec: QuantSpec,
    chip: int | None,
    *,
    columns: int | None,
    bias: bool,
    parts: int,
    squares: int,
) -> Config:
    """``columns``: appended ones, of which there may be 0; None: not asked for. c comes in so many
    ``parts``, the sums of squares in so many ``squares``."""
    acts = spec.activations
    constants = _appended(spec, columns, bias) | {
        "PARTS": parts, "SQUARES": squares, "QMAX": acts.largest, "UNIT": 2.0**acts.levels,
        "TOP": RMS_TOP, "TINY": TINY, "BM": ROWS, "CHAIN": chained(chip),
    }  # fmt: skip
    return Config(kernel=scales.scale_rows, constants=constants, early=chained(chip))


def rotate(
    spec: QuantSpec,
    chip: int | None,
    dtype: torch.dtype,
    chosen: Sweeps,
    *,
    channels: int,
    gelu: bool,
    protected: bool,
    codes: bool,
) -> Config:
    """``channels`` of one part of x; ``protected``: c is projected out; ``codes``: not z, leave."""
    s = rotate_sweep(chosen, spec.transform.block, spec.rank if protected else 0, _memory(chip))
    width = tile(spec)
    rounding: dict[str, Any] = {"G": 0, "QMAX": 0, "LEVELS": 0, "CLIP": 0.0}
    if codes:
        acts, clip = spec.activations, POW2_CLIP
        group = acts.group_size or 1
        rounding = {"G": group, "QMAX": acts.largest, "LEVELS": acts.levels, "CLIP": clip}
    constants = _shared(spec, chip, dtype) | rounding | {
        "SUB": max(1, spec.transform.block // width), "PROJECT": protected,
        "EVEN": channels % (4 * width) == 0, "BM": s.bm, "GELU": gelu, "STACKED": s.stacked,
    }  # fmt: skip
    return Config(
        kernel=sweeps.rotate, constants=constants, warps=s.warps, stages=s.stages,
        early=chained(chip) and protected,
    )  # fmt: skip


def round_rows(
    spec: QuantSpec, chip: int | None, s: Sweep, *, columns: int | None, bias: bool
) -> Config:
    """``columns``: appended ones, of which there may be 0; None: not asked for."""
    acts = spec.activations
    chain = chained(chip) and spec.transform.kind == "hadamard" and acts.statistic != "rms"
    rounding = "pow2" if acts.shifted else acts.granularity
    constants = _appended(spec, columns, bias) | {
        "SCALE": "float" if acts.element == "e4m3" else rounding, "G": acts.group_size or 64,
        "QMAX": acts.largest, "UNIT": 2.0**acts.levels, "LEVELS": acts.levels,
        "CLIP": POW2_CLIP, "TINY": TINY, "BM": s.bm, "BW": s.width, "CHAIN": chain,
    }  # fmt: skip
    return Config(kernel=sweeps.round_rows, constants=constants, warps=s.warps, early=chain)


def _shared(spec: QuantSpec, chip: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """Constants of both big sweeps."""
    width = tile(spec)
    return {
        "B": min(spec.transform.block, width),
        "W": width,
        "RP": width_of_c(spec.rank),
        "DOT": tl.float32 if INTERPRETED else DOTS[dtype],
        "CHAIN": chained(chip),
        "FAST": not INTERPRETED,
    }


def _appended(spec: QuantSpec, columns: int | None, bias: bool) -> dict[str, Any]:
    """Constants of who writes scales, and c behind the codes."""
    return {
        "R": spec.rank,
        "RP": width_of_c(spec.rank),
        "RT": max(appended_part(spec.rank, bias), 1),
        "APPENDED": columns is not None,
        "T": triton.next_power_of_2(columns) if columns else 0,
    }


def _memory(chip: int | None) -> int:
    """Whose shared memory a program may use."""
    return chip or CHIPS[-1]
