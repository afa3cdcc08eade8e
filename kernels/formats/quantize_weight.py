"""Specification of the weight grid (docs/method.md M4).

Letters: N outputs, K main-branch inputs, G groups per row, R protected directions.
"""

import itertools

import torch
from torch import Tensor

from ..appended import BIAS_LIMIT, LIMIT, TINY
from . import fp4, lm4
from .pack_int4 import pack_int4, unpack_int4
from .spec import QuantSpec
from .weight import Element

QMAX = 7
"""Largest code: symmetric 4-bit codes lie in [-7, 7]."""

LARGEST: dict[Element, float] = {"int4": QMAX, "lm4": lm4.LEVELS[-1]}
"""What a scale of 1 brings the largest weight to."""

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)

LM4_CLIPS = (*CLIPS, 1.15, 1.1, 1.05, 0.55, 0.5)
"""The same for LM4, whose outer levels lie far apart: a small group may want a larger scale than
that of its largest weight, and a row with a long tail a smaller one."""

FP4_CLIPS = {"nvfp4": (*CLIPS, 1.5), "mxfp4": (1.0, 2.0, 0.5)}
"""The same for FP4. 1.5 maps the largest weight to 4, around which E2M1 is denser ("four over six",
arXiv 2512.02010); a power of two has its neighbours for a choice."""

CHUNK = 1 << 25
"""Weights that are searched at a time: the search holds about six tensors of their size."""


def nearest_codes(w: Tensor, step: Tensor, element: Element = "int4") -> Tensor:
    """Return the nearest codes of w on the grid ``code * step``: floating, in w's shape."""
    if element == "e2m1":
        return fp4.nearest_e2m1(w, step)
    if element == "lm4":
        return lm4.nearest_lm4(w, step)
    # An all-zero group has scale 0: its codes are 0, not 0/0.
    return torch.where(step > 0, w / step, 0.0).round_().clamp_(-QMAX, QMAX)


def codes_on_grid(w_NK: Tensor, step_NG: Tensor, element: Element = "int4") -> Tensor:
    """Round to the nearest codes on a given grid: float [N, K], steps [N, G] -> int8 [N, K].

    step_NG  value of a code of 1 (:func:`weight_steps`): for ``int4`` the bf16 scales themselves
    """
    w_NGk = w_NK.unflatten(-1, (step_NG.shape[-1], -1))
    q = nearest_codes(w_NGk, step_NG.to(w_NK.dtype).unsqueeze(-1), element)
    return q.flatten(-2).to(torch.int8)


def dequantize_weight(q_NK: Tensor, scale_NG: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiply codes int8 [N, K] by steps [N, G] (bf16 scales, for ``int4``), in ``dtype``."""
    q_NGk = q_NK.to(dtype).unflatten(-1, (scale_NG.shape[-1], -1))
    return (q_NGk * scale_NG.to(dtype).unsqueeze(-1)).flatten(-2)


def pack_codes(q_NK: Tensor, element: Element) -> Tensor:
    """Pack int8 codes [N, K] as uint8 [N, K // 2]: layout L2 for ``e2m1``, else L1."""
    return {"int4": pack_int4, "lm4": lm4.pack_lm4, "e2m1": fp4.pack_e2m1}[element](q_NK)


def unpack_codes(qweight_NK2: Tensor, element: Element) -> Tensor:
    """Undo :func:`pack_codes`."""
    unpack = {"int4": unpack_int4, "lm4": lm4.unpack_lm4, "e2m1": fp4.unpack_e2m1}[element]
    return unpack(qweight_NK2)


def weight_steps(wscale_NG: Tensor, wglobal_1: Tensor | None, element: Element = "int4") -> Tensor:
    """Return the value of a code of 1, [N, G]: INT4's scales are it, others mean float32.

    wscale_NG  bf16 (``int4``, ``lm4``); or uint8, E4M3 with ``wglobal_1`` (NVFP4), E8M0 without
    wglobal_1  float32, [1], or None
    element    what a code is; bytes are scales of ``e2m1`` whatever it says
    """
    if wscale_NG.dtype == torch.uint8:
        return fp4.steps(wscale_NG, wglobal_1)
    return wscale_NG.float() / lm4.UNITS if element == "lm4" else wscale_NG


def unpack_weight(
    qweight_NK2: Tensor,
    wscale_NG: Tensor,
    wglobal_1: Tensor | None = None,
    element: Element = "int4",
) -> tuple[Tensor, Tensor]:
    """Return codes int8 [N, K] and steps [N, G] of a packed linear's buffers, in any format."""
    step_NG = weight_steps(wscale_NG, wglobal_1, element)
    return unpack_codes(qweight_NK2, "e2m1" if wscale_NG.dtype == torch.uint8 else element), step_NG


def stored_scales(
    w_NK: Tensor,
    spec: QuantSpec,
    *,
    clip: bool,
    importance_K: Tensor | None = None,
    floor_N1: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Choose ``wscale`` and ``wglobal`` of a weight as a packed linear of ``spec`` has them.

    See :func:`weight_scales` and :func:`fp4_weight_scales`; ``floor_N1`` is for channel scales.
    """
    if spec.weights.element == "e2m1":
        return fp4_weight_scales(w_NK, spec.weights.name, clip=clip, importance_K=importance_K)
    groups = spec.width // spec.weight_group_size
    scales = weight_scales(
        w_NK, groups, clip=clip, importance_K=importance_K, floor_N1=floor_N1,
        element=spec.weights.element,
    )  # fmt: skip
    return scales, None


def scale_floor(wp_NR: Tensor | None, bias_N: Tensor | None) -> Tensor | None:
    """Return the least channel scale with which an output's appended columns hold WP and bias.

    wp_NR    W P, bf16 as stored, [N, R], or None at rank 0
    bias_N   bf16 as stored, [N], or None
    returns  bf16, [N, 1]: max(|wp| / LIMIT, |bias| / BIAS_LIMIT), rounded up, and TINY or more
             unless both are zero (docs/method.md Eq. 9); None without wp and bias
    """
    needs = []
    if wp_NR is not None:
        needs.append(wp_NR.float().abs() / LIMIT)
    if bias_N is not None:
        needs.append(bias_N.float().abs()[:, None] / BIAS_LIMIT)
    if not any(need.shape[1] for need in needs):
        return None
    floor_N1 = torch.cat(needs, 1).amax(1, keepdim=True)
    # Denormal scales have no reciprocal.
    floor_N1 = torch.where(floor_N1 > 0, floor_N1.clamp_min(TINY), 0.0)
    # bf16 is the upper half of a float32. Carrying into it whatever the lower half holds rounds a
    # positive number up; rounding to nearest could fall below what the columns need.
    bits_N1 = floor_N1.view(torch.int32) + 0xFFFF
    return (bits_N1 & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


def appended_floor(spec: QuantSpec, wp_NR: Tensor | None, bias_N: Tensor | None) -> Tensor | None:
    """Return :func:`scale_floor` of a linear as it is stored; None if nothing can be appended.

    wp_NR, bias_N  float, rounded to bf16 here: the runtime and the loader meet the rounded values
    """
    if not spec.can_append:
        return None
    return scale_floor(*(None if t is None else t.to(torch.bfloat16) for t in (wp_NR, bias_N)))


def weight_scales(
    w_NK: Tensor,
    groups: int,
    *,
    clip: bool,
    importance_K: Tensor | None = None,
    floor_N1: Tensor | None = None,
    element: Element = "int4",
) -> Tensor:
    """Choose one scale per row and group: that of amax, or of the least weighted error.

    w_NK          float, [N, K], K a multiple of ``groups``
    importance_K  float >= 0, [K]: weight of a column's squared error (the diagonal of the second
                  moment); None counts all columns alike
    floor_N1      bf16, [N, 1]: no scale of a row is less (:func:`scale_floor`); None: no floor
    element       ``int4``, where amax is 7 scales, or ``lm4``, where it is 6
    returns       bf16, [N, groups]: rounded here, once, so that codes are chosen on the stored grid
    """
    columns_K = torch.ones_like(w_NK[0]) if importance_K is None else importance_K.to(w_NK.dtype)
    top, fractions = LARGEST[element], LM4_CLIPS if element == "lm4" else CLIPS
    rows = max(CHUNK // w_NK.shape[1], 1)
    floors = itertools.repeat(None) if floor_N1 is None else floor_N1.split(rows)
    parts = zip(w_NK.split(rows), floors)  # rows do not see each other
    found = []
    for w, floor in parts:
        amax_NG = w.unflatten(-1, (groups, -1)).abs().amax(-1)
        scales = [amax_NG * (f / top) for f in fractions] if clip else [amax_NG / top]
        # Raised before they are compared: the search sees only grids that may be stored.
        grids = [scale.to(torch.bfloat16) for scale in scales]
        grids = grids if floor is None else [torch.maximum(grid, floor) for grid in grids]
        pairs = [(grid, weight_steps(grid, None, element)) for grid in grids]
        found.append(_least_error(w, pairs, columns_K, element))
    return torch.cat(found)


def fp4_weight_scales(
    w_NK: Tensor, weight_scale: str, *, clip: bool, importance_K: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Choose scale bytes of ``nvfp4`` or ``mxfp4``, and NVFP4's global scale: of amax, or searched.

    w_NK          float, [N, K], K a multiple of the format's group
    importance_K  as for :func:`weight_scales`
    returns       uint8, [N, G], and float32, [1], or None (MXFP4)
    """
    columns_K = torch.ones_like(w_NK[0]) if importance_K is None else importance_K.to(w_NK.dtype)
    fractions = FP4_CLIPS[weight_scale] if clip else (1.0,)
    global_1 = None
    if weight_scale == "nvfp4":
        global_1 = fp4.global_scale(w_NK.abs().amax().reshape(1))
    parts = []
    for w in w_NK.split(max(CHUNK // w_NK.shape[1], 1)):
        amax_NG = w.unflatten(-1, (-1, fp4.GROUPS[weight_scale])).abs().amax(-1)
        stored = [fp4.group_scales(amax_NG * fraction, global_1) for fraction in fractions]
        grids = [(scale, fp4.steps(scale, global_1)) for scale in stored]
        parts.append(_least_error(w, grids, columns_K, "e2m1"))
    return torch.cat(parts), global_1


def _least_error(
    w_NK: Tensor, grids: list[tuple[Tensor, Tensor]], columns_K: Tensor, element: Element
) -> Tensor:
    """Of (stored scale, step) pairs, each [N, G], return per group the scale that loses least."""
    best = grids[0][0]
    if len(grids) == 1:
        return best
    least = torch.full(best.shape, torch.inf, dtype=w_NK.dtype, device=w_NK.device)
    for stored_NG, step_NG in grids:
        codes_NK = codes_on_grid(w_NK, step_NG, element)
        error_NK = dequantize_weight(codes_NK, step_NG, w_NK.dtype) - w_NK
        lost_NK = error_NK.square() * columns_K
        error_NG = lost_NK.unflatten(-1, (stored_NG.shape[-1], -1)).sum(-1)
        better = error_NG < least
        best = torch.where(better, stored_NG, best)
        least = torch.where(better, error_NG, least)
    return best
