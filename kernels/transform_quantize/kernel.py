"""Triton engine of ``transform_quantize``: launches the sweeps (sweeps.py) on real tensors.

Scales that need z (the largest of a row or of a group) take z through memory. Those of a row's root
mean square are known once c is, and codes come out of ``rotate``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import CHIPS
from ..chip import capability, chained
from ..formats.spec import QuantSpec
from ..planar import padded, planar_columns
from ..source import Source, plain
from ..tail import BIAS_COEFFICIENT, columns_with_tail, tail_part
from . import projection, scales
from . import sweeps as kernels
from .builds import builds
from .limits import MAX_RANK
from .reference import POW2_CLIP, RMS_TOP, TINY
from .shapes import (
    DEFAULT,
    Sweep,
    Sweeps,
    parts,
    programs,
    project_sweep,
    rotate_sweep,
    tile,
    tiles,
    usual,
    warps_of_row,
    width_of_c,
)

__all__ = ["DEFAULT", "MAX_RANK", "Sweep", "Sweeps", "builds", "launch", "usual"]

INTERPRETED = bool(triton.knobs.runtime.interpret)
DOTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def launch(
    x_MD: Tensor | Source,
    p_DR: Tensor | None,
    t_DK: Tensor | None,
    spec: QuantSpec,
    *,
    container: torch.dtype,
    tail: bool = False,
    bias: bool = False,
    sweeps: Sweeps | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and c (:func:`.reference.transform_quantize`) as the GEMMs want them.

    x_MD       bf16 or fp16, [M, D], last dim contiguous; or a source of that many rows and channels
    p_DR       bf16, [D, R], contiguous, or None at rank 0
    t_DK       bf16, [D, K]; ``transform="dense"`` only
    container  int8 or float8_e4m3fn: the dtype of codes
    tail       c (and the coefficient of a ``bias``) become columns behind the codes: float8 and
               one scale per row only
    returns    codes [M, padded(K)] in R1 order (``tail``: [M, columns_with_tail(K, R, bias)]),
               scale float32 [M, G], c [M, R] in x's dtype (None at rank 0 or with ``tail``)
    sweeps     None: those of the chip
    """
    source = x_MD if isinstance(x_MD, Source) else plain(x_MD[None])
    m, k, r = source.rows, spec.width, spec.rank
    new = source.x_BTD.new_empty
    acts = spec.activations
    groups = k // spec.act_group_size if acts.granularity == "group" else 1
    codes = new((m, columns_with_tail(k, r, bias) if tail else padded(k)), dtype=container)
    scale = new((m, groups), dtype=torch.float32)
    c: Tensor | None
    if p_DR is not None and _straight(spec) and m:
        c = _by_root_mean_square(source, p_DR, spec, codes, scale, tail, bias, sweeps)
    else:
        z, amax, c = _rotated(source, p_DR, t_DK, spec, sweeps)
        if acts.statistic == "rms":
            squares = z.float().square_().sum(1)  # of K channels: padding is zero
            amax = (RMS_TOP * (squares / k).sqrt()).view(torch.int32)
        last = DEFAULT["plain"] if sweeps is None else sweeps
        _round_rows(z, c, amax, codes, scale, spec, tail, bias, last.round_rows)
    return codes, scale, None if tail or c is None else c[:, :r]


def _straight(spec: QuantSpec) -> bool:
    """Whether codes can come without z: its length follows from x's and c's, and a group lies in
    one tile."""
    inside = spec.transform.kind == "hadamard" and not _beyond(spec)
    return (
        spec.activations.statistic == "rms" and inside and (spec.activations.group_size or 1) <= 64
    )


def _beyond(spec: QuantSpec) -> bool:
    """Whether there are more directions than ``rotate`` projects out."""
    return spec.rank > (64 if spec.transform.block == 512 else MAX_RANK)


def _by_root_mean_square(
    source: Source,
    p_DR: Tensor,
    spec: QuantSpec,
    codes_MK: Tensor,
    scale_M1: Tensor,
    tail: bool,
    bias: bool,
    sweeps: Sweeps | None,
) -> Tensor:
    """Fill codes and scales of a row's root mean square; returns c [M, padded R]."""
    source, squares = _computed(source, p_DR, spec)
    chosen = sweeps or usual(source.kind, capability(source.x_BTD.device))
    new, m, r = source.x_BTD.new_empty, source.rows, spec.rank
    cut = parts(source.x_BTD, source.channels, chosen.project)
    rp, chain = width_of_c(r), chained(source.x_BTD)
    products = new((cut[0], m, rp), dtype=torch.float32)
    known = squares is not None
    if squares is None:
        squares = new((cut[0], m), dtype=torch.float32)
    c, row = new((m, rp)), new((2, m), dtype=torch.float32)
    spread = new((tiles(spec) * tile(spec), rp))
    _project(source, p_DR, spec, products, spread, None, None if known else squares, cut, chosen)
    behind = codes_MK.shape[1] - padded(spec.width)
    scales.scale_rows[(triton.cdiv(m, 16),)](
        products, squares, c, codes_MK, scale_M1, row, m, source.channels, codes_MK.stride(0),
        padded(spec.width), BIAS_COEFFICIENT if bias else 0.0,
        R=r, RP=rp, RT=max(tail_part(r, bias), 1), TAIL=tail,
        T=triton.next_power_of_2(behind) if behind else 0,
        PARTS=cut[0], SQUARES=len(squares), QMAX=spec.activations.largest,
        UNIT=2.0**spec.activations.levels,
        TOP=RMS_TOP, TINY=TINY, BM=16, CHAIN=chain, num_warps=4, launch_pdl=chain,
    )  # fmt: skip
    _rotate(source, spec, c, spread, codes_MK, padded(spec.width), None, row, chosen)
    return c


def _rotated(
    source: Source,
    p_DR: Tensor | None,
    t_DK: Tensor | None,
    spec: QuantSpec,
    sweeps: Sweeps | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """z [M, padded(K)] in R1 order, the bits of each row's largest |z| (int32 [M]), and c."""
    if spec.transform.kind == "dense":
        return _dense(source.value().flatten(0, 1), p_DR, t_DK, spec.width)
    source, _ = _computed(source, p_DR, spec)
    source, outside = _project_outside(source, p_DR, spec)
    chosen = sweeps or usual(source.kind, capability(source.x_BTD.device))
    new, m, rp = source.x_BTD.new_empty, source.rows, width_of_c(spec.rank)
    z, amax = new((m, padded(spec.width))), new((m,), dtype=torch.int32)
    if p_DR is None or outside is not None:
        amax.zero_()
        _rotate(source, spec, None, z, z, z.shape[1], amax, None, chosen)
        return z, amax, outside
    c, spread = new((m, rp)), new((tiles(spec) * tile(spec), rp))
    cut = parts(source.x_BTD, source.channels, chosen.project)
    products = new((cut[0], m, rp), dtype=torch.float32) if cut[0] > 1 else c
    _project(source, p_DR, spec, products, spread, amax, None, cut, chosen)
    if cut[0] > 1:
        chain = chained(z)
        projection.gather[(triton.cdiv(m, 16),)](
            products, c, amax, m, RP=rp, PARTS=cut[0], BM=16, CHAIN=chain,
            num_warps=4, launch_pdl=chain,
        )  # fmt: skip
    _rotate(source, spec, c, spread, z, z.shape[1], amax, None, chosen)
    return z, amax, c


def _computed(source: Source, p_DR: Tensor | None, spec: QuantSpec) -> tuple[Source, Tensor | None]:
    """The source as the sweeps read it: what they can't do on the way in is done here. With it,
    for ``rms``, the sums of its squares, float32 [1, M], where they cost nothing."""
    split = source.x_BTD.shape[-1]
    torn = source.kind == "concat" and split % (4 * tile(spec))
    if source.known is not None:
        return plain(source.known[0]), source.known[1]
    if source.kind == "norm":
        return _normalized(source.laid_out(), spec.activations.statistic == "rms")
    beyond = p_DR is not None and _beyond(spec)
    return plain(source.value()) if beyond or torn else source.laid_out(), None


def _normalized(source: Source, squared: bool) -> tuple[Source, Tensor | None]:
    """y of a ``norm`` as a plain source and, if ``squared``, the sums of its squares, [1, M]."""
    x, scale, shift = source.x_BTD, source.scale_BD, source.shift_BD
    assert scale is not None and shift is not None
    y_1MD = x.new_empty((1, source.rows, x.shape[-1]))
    squares = x.new_empty((1, source.rows), dtype=torch.float32) if squared else None
    width = triton.next_power_of_2(x.shape[-1])
    projection.normalize[(source.rows,)](
        x, scale, shift, y_1MD, y_1MD if squares is None else squares, x.shape[1], x.shape[2],
        x.stride(0), x.stride(1), scale.stride(0), source.eps, SQUARES=squared, BD=width,
        num_warps=warps_of_row(width),
    )  # fmt: skip
    return plain(y_1MD), squares


def _project(
    source: Source,
    p_DR: Tensor,
    spec: QuantSpec,
    products: Tensor,
    spread_DR: Tensor,
    amax_M: Tensor | None,
    squares: Tensor | None,
    cut: tuple[int, int],
    sweeps: Sweeps,
) -> None:
    """Fill c or its parts, cut = (how many, columns of one), the spread basis, and, if asked for,
    the sums of x's squares by part; zero ``amax``, if given, where c is whole
    (``projection.project``)."""
    x, d = source.x_BTD, source.channels
    s = project_sweep(sweeps, spec.rank, _chip(x))
    blocks = triton.cdiv(x.shape[1], s.bm)
    n_main = x.shape[0] * blocks
    projection.project[(n_main * cut[0] + tiles(spec),)](
        *_pointers(source), p_DR, products, spread_DR, products if amax_M is None else amax_M,
        products if squares is None else squares,
        source.rows, x.shape[1], d, *_strides(source), blocks, n_main, cut[1],
        R=spec.rank, EVEN=d % s.width == 0, BM=s.bm, BK=s.width, PARTS=cut[0],
        SQUARES=squares is not None, AMAX=amax_M is not None, KIND=source.kind,
        **_constants(x, spec),
        num_warps=s.warps, num_stages=s.stages, launch_pdl=chained(x),
    )  # fmt: skip


def _rotate(
    source: Source,
    spec: QuantSpec,
    c_MR: Tensor | None,
    spread_DR: Tensor,
    out_MK: Tensor,
    columns: int,
    amax_M: Tensor | None,
    row_2M: Tensor | None,
    sweeps: Sweeps,
) -> None:
    """Fill ``columns`` of z and raise ``amax`` or, with ``row``, of codes (``sweeps.rotate``): one
    of the two is None. The parts of a concatenation are launches of their own: a kernel that can do
    both has shared memory for both."""
    first, width = source.x_BTD, tile(spec)
    split = columns if source.behind_BTF is None else first.shape[-1]
    acts, block = spec.activations, spec.transform.block
    s = rotate_sweep(sweeps, block, 0 if c_MR is None else spec.rank, _chip(first))
    for x, gelu, begin, end in (
        (first, source.kind == "gelu", 0, split), (source.behind_BTF, True, split, columns),
    ):  # fmt: skip
        if x is None:
            continue
        d, blocks = x.shape[-1], triton.cdiv(x.shape[1], s.bm)
        n_col, n_row = triton.cdiv(d, 4 * width), x.shape[0] * blocks
        kernels.rotate[(programs(x, n_row, n_col, s),)](
            x, x if c_MR is None else c_MR, spread_DR if c_MR is None else spread_DR[begin:],
            out_MK[:, begin:], row_2M if amax_M is None else amax_M,
            amax_M if row_2M is None else row_2M, source.rows, x.shape[1], d, x.stride(0),
            x.stride(1), out_MK.stride(0), end - begin, n_col, blocks, n_row, block**-0.5,
            SUB=max(1, block // width), PROJECT=c_MR is not None, EVEN=d % (4 * width) == 0,
            BM=s.bm, GELU=gelu, STACKED=s.stacked,
            G=0 if row_2M is None else acts.group_size or 1, QMAX=acts.largest, LEVELS=acts.levels,
            CLIP=POW2_CLIP, **_constants(x, spec),
            num_warps=s.warps, num_stages=s.stages,
            launch_pdl=chained(x) and c_MR is not None,
        )  # fmt: skip


def _constants(x: Tensor, spec: QuantSpec) -> dict[str, Any]:
    """Of both big sweeps."""
    width = tile(spec)
    return {
        "B": min(spec.transform.block, width),
        "W": width,
        "RP": width_of_c(spec.rank),
        "DOT": tl.float32 if INTERPRETED else DOTS[x.dtype],
        "CHAIN": chained(x),
        "FAST": not INTERPRETED,
    }


def _pointers(source: Source) -> tuple[Tensor, Tensor]:
    return source.x_BTD, source.x_BTD if source.behind_BTF is None else source.behind_BTF


def _strides(source: Source) -> tuple[int, ...]:
    """Of images and rows of both parts, and where the second begins."""
    x, behind = _pointers(source)
    return x.stride(0), x.stride(1), behind.stride(0), behind.stride(1), x.shape[-1]


def _round_rows(
    z_MK: Tensor,
    c_MR: Tensor | None,
    amax_M: Tensor,
    codes_MK: Tensor,
    scale_MG: Tensor,
    spec: QuantSpec,
    tail: bool,
    bias: bool,
    s: Sweep,
) -> None:
    m, k, r = len(z_MK), spec.width, spec.rank
    n_col = triton.cdiv(padded(k), s.width)
    behind = codes_MK.shape[1] - padded(k)
    acts = spec.activations
    chain = chained(z_MK) and spec.transform.kind == "hadamard" and acts.statistic != "rms"
    floats = acts.element == "e4m3"
    kernels.round_rows[(triton.cdiv(m, s.bm) * n_col,)](
        z_MK, z_MK if c_MR is None else c_MR, amax_M, codes_MK, scale_MG, m, k, z_MK.stride(0),
        codes_MK.stride(0), scale_MG.stride(0), padded(k), n_col,
        BIAS_COEFFICIENT if bias else 0.0,
        R=r, RP=width_of_c(r), RT=max(tail_part(r, bias), 1),
        TAIL=tail, T=triton.next_power_of_2(behind) if behind else 0,
        SCALE="float" if floats else "pow2" if acts.shifted else acts.granularity,
        G=acts.group_size or 64,
        QMAX=acts.largest, UNIT=2.0**acts.levels, LEVELS=acts.levels,
        CLIP=POW2_CLIP, TINY=TINY, BM=s.bm, BW=s.width,
        CHAIN=chain, num_warps=s.warps, launch_pdl=chain,
    )  # fmt: skip


def _dense(
    x_MD: Tensor, p_DR: Tensor | None, t_DK: Tensor | None, width: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """z = x T in R1 order, the bits of each row's largest |z|, and c: library products."""
    assert t_DK is not None
    columns = planar_columns(width, x_MD.device)
    z = x_MD @ t_DK.to(x_MD.dtype)[:, columns.clamp_max(width - 1)]
    z[:, columns >= width] = 0
    amax = z.abs().amax(1).float().view(torch.int32)
    return z, amax, None if p_DR is None else _padded(x_MD @ p_DR.to(x_MD.dtype))


def _project_outside(
    source: Source, p_DR: Tensor | None, spec: QuantSpec
) -> tuple[Source, Tensor | None]:
    """x - c Pᵀ and c by library products where the rank is too large for ``rotate``."""
    if p_DR is None or not _beyond(spec):
        return source, None
    x_MD, p = source.x_BTD.flatten(0, 1), p_DR.to(source.x_BTD.dtype)
    c = x_MD @ p
    return plain((x_MD - c @ p.mT)[None]), _padded(c)


def _padded(c_MR: Tensor) -> Tensor:
    return torch.nn.functional.pad(c_MR, (0, width_of_c(c_MR.shape[1]) - c_MR.shape[1]))


def _chip(x: Tensor) -> int:
    """Whose shared memory a program may use."""
    return capability(x.device) or CHIPS[-1]
