"""Triton engine of ``transform_quantize``: launches the passes (passes.py) on real tensors.

Scales that need z (the largest of a row or of a group) take z through memory. Those of a row's root
mean square are known once c is, and codes come out of ``rotate``.
"""

import torch
import triton
from torch import Tensor

from ..appended import BIAS_COEFFICIENT, columns_with_appended
from ..buffers import Codes
from ..chip import capability
from ..formats.spec import QuantSpec
from ..permuted import padded, permuted_columns
from ..prologue import Prologue, plain
from . import MAX_DIRECTIONS, MAX_RANK, configs
from .configs import parts, programs, tile, tiles, usual, width_of_c
from .reference import RMS_TOP

__all__ = ["MAX_RANK", "launch", "usual"]


def launch(
    x_MD: Tensor | Prologue,
    p_DR: Tensor | None,
    t_DK: Tensor | None,
    spec: QuantSpec,
    *,
    container: torch.dtype,
    appended: bool = False,
    bias: bool = False,
    beside: int = 0,
) -> Codes:
    """Compute codes, scales and c (:func:`.reference.transform_quantize`) as the GEMMs want them.

    x_MD       bf16 or fp16, [M, D], last dim contiguous; or a prologue of such rows and channels
    p_DR       bf16, [D, R], contiguous, or None at rank 0
    t_DK       bf16, [D, K]; ``transform="dense"`` only
    container  int8 or float8_e4m3fn: the dtype of codes
    appended   c (and the coefficient of a ``bias``) become columns behind the codes: float8 and
               one scale per row only
    beside     last directions of P that stay in z: c has them, and nothing else knows of them
    returns    codes [M, padded(K)] in R1 order (``appended``: [M, columns_with_appended(...)]),
               scale float32 [M, G], c [M, R] in x's dtype (None at rank 0 or if ``appended``)
    """
    x = x_MD if isinstance(x_MD, Prologue) else plain(x_MD[None])
    m, k, r = x.rows, spec.width, spec.rank
    new = x.x_BTD.new_empty
    groups = k // spec.act_group_size if spec.activations.granularity == "group" else 1
    width = columns_with_appended(k, r, bias) if appended else padded(k)
    behind = width - padded(k) if appended else None
    codes, scale = new((m, width), dtype=container), new((m, groups), dtype=torch.float32)
    c: Tensor | None
    if p_DR is not None and _straight(spec, beside) and m:
        c = _by_root_mean_square(x, p_DR, spec, codes, scale, behind, bias, beside)
    else:
        z, amax, c = rotated(x, p_DR, t_DK, spec, beside)
        if spec.activations.statistic == "rms":
            squares = z.float().square_().sum(1)  # of K channels: padding is zero
            amax = (RMS_TOP * (squares / k).sqrt()).view(torch.int32)
        n_col = triton.cdiv(padded(k), configs.ROUND_COLUMNS)
        configs.round_rows(spec, capability(z.device), behind, bias=bias).launch(
            (triton.cdiv(m, configs.ROUND_ROWS) * n_col,),
            z, z if c is None else c, amax, codes, scale, m, k, z.stride(0), codes.stride(0),
            scale.stride(0), padded(k), n_col, BIAS_COEFFICIENT if bias else 0.0,
        )  # fmt: skip
    return Codes(codes, scale, None if appended or c is None else c[:, :r])


def _straight(spec: QuantSpec, beside: int) -> bool:
    """Whether codes can come without z: its length follows from x's and c's, and a group lies in
    one tile."""
    acts = spec.activations
    inside = spec.transform.kind == "hadamard" and not _beyond(spec, beside)
    return acts.statistic == "rms" and inside and (acts.group_size or 1) <= 64


def _beyond(spec: QuantSpec, beside: int) -> bool:
    """Whether there are more directions than ``project`` finds, or ``rotate`` projects out."""
    most = 64 if spec.transform.block == 512 else MAX_RANK
    return spec.rank > MAX_DIRECTIONS or spec.rank - beside > most


def _by_root_mean_square(
    prologue: Prologue,
    p_DR: Tensor,
    spec: QuantSpec,
    codes_MK: Tensor,
    scale_M1: Tensor,
    behind: int | None,
    bias: bool,
    beside: int,
) -> Tensor:
    """Fill codes and scales of ``act_scale="rms"``; return c [M, padded R]."""
    prologue = _computed(prologue, spec, beside)
    chip, m = capability(prologue.x_BTD.device), prologue.rows
    products, spread, squares = _project(prologue, p_DR, spec, beside, squares=True)
    assert squares is not None
    c = spread.new_empty(products.shape[1:])
    row = products.new_empty((2, m))
    config = configs.scale_rows(spec, chip, behind, bias=bias, parts=len(products), beside=beside)
    config.launch(
        (triton.cdiv(m, configs.ROWS),),
        products, squares, c, codes_MK, scale_M1, row, m, prologue.channels, codes_MK.stride(0),
        padded(spec.width), BIAS_COEFFICIENT if bias else 0.0,
    )  # fmt: skip
    _rotate(prologue, spec, spec.rank - beside, c, spread, codes_MK, row_2M=row)
    return c


def rotated(
    prologue: Prologue,
    p_DR: Tensor | None,
    t_DK: Tensor | None,
    spec: QuantSpec,
    beside: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return z [M, padded(K)] in R1 order, the bits of its rows' largest |z| (int32 [M]), and c."""
    if spec.transform.kind == "dense":
        return _dense(prologue.value().flatten(0, 1), p_DR, t_DK, spec.width)
    prologue = _computed(prologue, spec, beside)
    x, lead = prologue.x_BTD, spec.rank - beside
    c: Tensor | None = None
    if p_DR is not None and _beyond(spec, beside):
        x_MD, p = x.flatten(0, 1), p_DR.to(x.dtype)
        outside = x_MD @ p
        prologue = plain((x_MD - outside[:, :lead] @ p[:, :lead].mT)[None])
        c = _padded(outside)
    m = prologue.rows
    z, amax = x.new_empty((m, padded(spec.width))), x.new_empty((m,), dtype=torch.int32)
    if p_DR is None or c is not None:
        amax.zero_()
        _rotate(prologue, spec, 0, z, z, z, amax_M=amax)
        return z, amax, c
    products, spread, _ = _project(prologue, p_DR, spec, beside, amax_M=amax)
    c = products[0]
    if len(products) > 1:
        c = spread.new_empty(c.shape)
        config = configs.gather(spec, capability(x.device), parts=len(products))
        config.launch((triton.cdiv(m, configs.ROWS),), products, c, amax, m)
    _rotate(prologue, spec, lead, c, spread, z, amax_M=amax)
    return z, amax, c


def _computed(prologue: Prologue, spec: QuantSpec, beside: int) -> Prologue:
    """Compute of the prologue what the passes can't do on the way in."""
    torn = prologue.kind == "concat" and prologue.x_BTD.shape[-1] % (4 * tile(spec))
    return plain(prologue.value()) if torn or _beyond(spec, beside) else prologue.laid_out()


def _project(
    prologue: Prologue,
    p_DR: Tensor,
    spec: QuantSpec,
    beside: int,
    *,
    squares: bool = False,
    amax_M: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return c in parts [PARTS, M, padded R], the spread basis, and, if asked for, the sums of x's
    squares by part, float32 [PARTS, M] (``projection.project``).

    ``amax_M`` asks for c in x's dtype where it is whole, and is zeroed there.
    """
    x, d, m, rp = prologue.x_BTD, prologue.channels, prologue.rows, width_of_c(spec.rank)
    behind = x if prologue.behind_BTF is None else prologue.behind_BTF
    chip = capability(x.device)
    shapes = usual(prologue.kind, chip)
    n_parts, part = parts(x, d, shapes.project)
    whole = amax_M is not None and n_parts == 1
    products = x.new_empty((n_parts, m, rp), dtype=x.dtype if whole else torch.float32)
    spread_DR = x.new_empty((tiles(spec) * tile(spec), width_of_c(spec.rank - beside)))
    sums = x.new_empty((n_parts, m), dtype=torch.float32) if squares else None
    config = configs.project(
        spec, prologue.kind, chip, x.dtype, shapes, parts=n_parts, beside=beside, squares=squares,
        amax=amax_M is not None,
    )  # fmt: skip
    blocks = triton.cdiv(x.shape[1], config.constants["BM"])
    n_main = x.shape[0] * blocks
    config.launch(
        (n_main * n_parts + tiles(spec),),
        x, behind, p_DR, products, spread_DR, products if amax_M is None else amax_M,
        products if sums is None else sums, m, x.shape[1], d, x.stride(0), x.stride(1),
        behind.stride(0), behind.stride(1), x.shape[-1], blocks, n_main, part,
    )  # fmt: skip
    return products, spread_DR, sums


def _rotate(
    prologue: Prologue,
    spec: QuantSpec,
    lead: int,
    c_MR: Tensor,
    spread_DR: Tensor,
    out_MK: Tensor,
    *,
    amax_M: Tensor | None = None,
    row_2M: Tensor | None = None,
) -> None:
    """Fill z and raise ``amax`` or, with ``row``, fill codes (``passes.rotate``): one of the two is
    None. ``lead`` directions of c are projected out; of none, c and the spread basis are not read.
    The parts of a concatenation are launches of their own: a kernel that can do both has shared
    memory for both."""
    first, behind, block = prologue.x_BTD, prologue.behind_BTF, spec.transform.block
    chip, columns = capability(first.device), padded(spec.width)
    shapes = usual(prologue.kind, chip)
    split = columns if behind is None else first.shape[-1]
    for x, gelu, begin, end in (
        (first, prologue.kind == "gelu", 0, split), (behind, True, split, columns),
    ):  # fmt: skip
        if x is None:
            continue
        d = x.shape[-1]
        config = configs.rotate(
            spec, chip, x.dtype, shapes, channels=d, gelu=gelu, protected=lead,
            codes=row_2M is not None,
        )  # fmt: skip
        blocks = triton.cdiv(x.shape[1], config.constants["BM"])
        n_row, n_col = x.shape[0] * blocks, triton.cdiv(d, 4 * tile(spec))
        config.launch(
            (programs(x, n_row, n_col, shapes.rotate, block),),
            x, c_MR, spread_DR[begin:] if lead else spread_DR, out_MK[:, begin:],
            row_2M if amax_M is None else amax_M,
            amax_M if row_2M is None else row_2M, prologue.rows, x.shape[1], d, x.stride(0),
            x.stride(1), out_MK.stride(0), end - begin, n_col, blocks, n_row, block**-0.5,
        )  # fmt: skip


def _dense(
    x_MD: Tensor, p_DR: Tensor | None, t_DK: Tensor | None, width: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute z = x T in R1 order, the bits of each row's largest |z|, and c: library products."""
    assert t_DK is not None
    columns = permuted_columns(width, x_MD.device)
    z = x_MD @ t_DK.to(x_MD.dtype)[:, columns.clamp_max(width - 1)]
    z[:, columns >= width] = 0
    amax = z.abs().amax(1).float().view(torch.int32)
    return z, amax, None if p_DR is None else _padded(x_MD @ p_DR.to(x_MD.dtype))


def _padded(c_MR: Tensor) -> Tensor:
    return torch.nn.functional.pad(c_MR, (0, width_of_c(c_MR.shape[1]) - c_MR.shape[1]))
