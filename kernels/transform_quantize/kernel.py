"""Triton engine of ``transform_quantize``: launches the sweeps (sweeps.py) on real tensors.

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
from . import configs
from .builds import builds
from .limits import MAX_RANK
from .reference import RMS_TOP
from .shapes import DEFAULT, Sweep, Sweeps, parts, programs, tile, tiles, usual, width_of_c

__all__ = ["DEFAULT", "MAX_RANK", "Sweep", "Sweeps", "builds", "launch", "usual"]


def launch(
    x_MD: Tensor | Prologue,
    p_DR: Tensor | None,
    t_DK: Tensor | None,
    spec: QuantSpec,
    *,
    container: torch.dtype,
    appended: bool = False,
    bias: bool = False,
    sweeps: Sweeps | None = None,
) -> Codes:
    """Codes, scales and c (:func:`.reference.transform_quantize`) as the GEMMs want them.

    x_MD       bf16 or fp16, [M, D], last dim contiguous; or a prologue of such rows and channels
    p_DR       bf16, [D, R], contiguous, or None at rank 0
    t_DK       bf16, [D, K]; ``transform="dense"`` only
    container  int8 or float8_e4m3fn: the dtype of codes
    appended   c (and the coefficient of a ``bias``) become columns behind the codes: float8 and
               one scale per row only
    returns    codes [M, padded(K)] in R1 order (``appended``: [M, columns_with_appended(...)]),
               scale float32 [M, G], c [M, R] in x's dtype (None at rank 0 or if ``appended``)
    sweeps     None: those of the chip
    """
    x = x_MD if isinstance(x_MD, Prologue) else plain(x_MD[None])
    m, k, r = x.rows, spec.width, spec.rank
    new = x.x_BTD.new_empty
    groups = k // spec.act_group_size if spec.activations.granularity == "group" else 1
    width = columns_with_appended(k, r, bias) if appended else padded(k)
    behind = width - padded(k) if appended else None
    codes, scale = new((m, width), dtype=container), new((m, groups), dtype=torch.float32)
    c: Tensor | None
    if p_DR is not None and _straight(spec) and m:
        c = _by_root_mean_square(x, p_DR, spec, codes, scale, behind, bias, sweeps)
    else:
        z, amax, c = _rotated(x, p_DR, t_DK, spec, sweeps)
        if spec.activations.statistic == "rms":
            squares = z.float().square_().sum(1)  # of K channels: padding is zero
            amax = (RMS_TOP * (squares / k).sqrt()).view(torch.int32)
        last = DEFAULT["plain"] if sweeps is None else sweeps
        _round_rows(z, c, amax, codes, scale, spec, behind, bias, last.round_rows)
    return Codes(codes, scale, None if appended or c is None else c[:, :r])


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
    prologue: Prologue,
    p_DR: Tensor,
    spec: QuantSpec,
    codes_MK: Tensor,
    scale_M1: Tensor,
    behind: int | None,
    bias: bool,
    sweeps: Sweeps | None,
) -> Tensor:
    """Fill codes and scales of ``act_scale="rms"``; returns c [M, padded R]."""
    prologue, squares = _computed(prologue, p_DR, spec)
    chip = capability(prologue.x_BTD.device)
    chosen = sweeps or usual(prologue.kind, chip)
    new, m, rp = prologue.x_BTD.new_empty, prologue.rows, width_of_c(spec.rank)
    cut = parts(prologue.x_BTD, prologue.channels, chosen.project)
    products = new((cut[0], m, rp), dtype=torch.float32)
    known = squares is not None
    if squares is None:
        squares = new((cut[0], m), dtype=torch.float32)
    c, row = new((m, rp)), new((2, m), dtype=torch.float32)
    spread = new((tiles(spec) * tile(spec), rp))
    _project(prologue, p_DR, spec, products, spread, None, None if known else squares, cut, chosen)
    configs.scale_rows(
        spec, chip, columns=behind, bias=bias, parts=cut[0], squares=len(squares)
    ).launch(
        (triton.cdiv(m, configs.ROWS),),
        products, squares, c, codes_MK, scale_M1, row, m, prologue.channels, codes_MK.stride(0),
        padded(spec.width), BIAS_COEFFICIENT if bias else 0.0,
    )  # fmt: skip
    _rotate(prologue, spec, c, spread, codes_MK, padded(spec.width), None, row, chosen)
    return c


def _rotated(
    prologue: Prologue,
    p_DR: Tensor | None,
    t_DK: Tensor | None,
    spec: QuantSpec,
    sweeps: Sweeps | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """z [M, padded(K)] in R1 order, the bits of each row's largest |z| (int32 [M]), and c."""
    if spec.transform.kind == "dense":
        return _dense(prologue.value().flatten(0, 1), p_DR, t_DK, spec.width)
    prologue, _ = _computed(prologue, p_DR, spec)
    prologue, outside = _project_outside(prologue, p_DR, spec)
    chip = capability(prologue.x_BTD.device)
    chosen = sweeps or usual(prologue.kind, chip)
    new, m, rp = prologue.x_BTD.new_empty, prologue.rows, width_of_c(spec.rank)
    z, amax = new((m, padded(spec.width))), new((m,), dtype=torch.int32)
    if p_DR is None or outside is not None:
        amax.zero_()
        _rotate(prologue, spec, None, z, z, z.shape[1], amax, None, chosen)
        return z, amax, outside
    c, spread = new((m, rp)), new((tiles(spec) * tile(spec), rp))
    cut = parts(prologue.x_BTD, prologue.channels, chosen.project)
    products = new((cut[0], m, rp), dtype=torch.float32) if cut[0] > 1 else c
    _project(prologue, p_DR, spec, products, spread, amax, None, cut, chosen)
    if cut[0] > 1:
        grid = (triton.cdiv(m, configs.ROWS),)
        configs.gather(spec, chip, parts=cut[0]).launch(grid, products, c, amax, m)
    _rotate(prologue, spec, c, spread, z, z.shape[1], amax, None, chosen)
    return z, amax, c


def _computed(
    prologue: Prologue, p_DR: Tensor | None, spec: QuantSpec
) -> tuple[Prologue, Tensor | None]:
    """The prologue as the sweeps read it: what they can't do on the way in is done here. With it,
    for ``rms``, the sums of its squares, float32 [1, M], where they cost nothing."""
    split = prologue.x_BTD.shape[-1]
    torn = prologue.kind == "concat" and split % (4 * tile(spec))
    if prologue.known is not None:
        return plain(prologue.known[0]), prologue.known[1]
    if prologue.kind == "norm":
        return _normalized(prologue.laid_out(), spec.activations.statistic == "rms")
    beyond = p_DR is not None and _beyond(spec)
    return plain(prologue.value()) if beyond or torn else prologue.laid_out(), None


def _normalized(prologue: Prologue, squared: bool) -> tuple[Prologue, Tensor | None]:
    """y of a ``norm`` as a plain prologue and, if ``squared``, the sums of its squares, [1, M]."""
    x, scale, shift = prologue.x_BTD, prologue.scale_BD, prologue.shift_BD
    assert scale is not None and shift is not None
    y_1MD = x.new_empty((1, prologue.rows, x.shape[-1]))
    squares = x.new_empty((1, prologue.rows), dtype=torch.float32) if squared else None
    configs.normalize(x.shape[-1], squares=squared).launch(
        (prologue.rows,), x, scale, shift, y_1MD, y_1MD if squares is None else squares, x.shape[1],
        x.shape[2], x.stride(0), x.stride(1), scale.stride(0), prologue.eps,
    )  # fmt: skip
    return plain(y_1MD), squares


def _project(
    prologue: Prologue,
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
    x, d = prologue.x_BTD, prologue.channels
    config = configs.project(
        spec, prologue.kind, capability(x.device), x.dtype, sweeps, parts=cut[0],
        squares=squares is not None, amax=amax_M is not None,
    )  # fmt: skip
    blocks = triton.cdiv(x.shape[1], config.constants["BM"])
    n_main = x.shape[0] * blocks
    config.launch(
        (n_main * cut[0] + tiles(spec),),
        *_pointers(prologue), p_DR, products, spread_DR, products if amax_M is None else amax_M,
        products if squares is None else squares,
        prologue.rows, x.shape[1], d, *_strides(prologue), blocks, n_main, cut[1],
    )  # fmt: skip


def _rotate(
    prologue: Prologue,
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
    first, width, block = prologue.x_BTD, tile(spec), spec.transform.block
    chip = capability(first.device)
    split = columns if prologue.behind_BTF is None else first.shape[-1]
    for x, gelu, begin, end in (
        (first, prologue.kind == "gelu", 0, split), (prologue.behind_BTF, True, split, columns),
    ):  # fmt: skip
        if x is None:
            continue
        d = x.shape[-1]
        config = configs.rotate(
            spec, chip, x.dtype, sweeps, channels=d, gelu=gelu, protected=c_MR is not None,
            codes=row_2M is not None,
        )  # fmt: skip
        blocks, n_col = triton.cdiv(x.shape[1], config.constants["BM"]), triton.cdiv(d, 4 * width)
        n_row = x.shape[0] * blocks
        config.launch(
            (programs(x, n_row, n_col, sweeps.rotate, block),),
            x, x if c_MR is None else c_MR, spread_DR if c_MR is None else spread_DR[begin:],
            out_MK[:, begin:], row_2M if amax_M is None else amax_M,
            amax_M if row_2M is None else row_2M, prologue.rows, x.shape[1], d, x.stride(0),
            x.stride(1), out_MK.stride(0), end - begin, n_col, blocks, n_row, block**-0.5,
        )  # fmt: skip


def _pointers(prologue: Prologue) -> tuple[Tensor, Tensor]:
    return prologue.x_BTD, prologue.x_BTD if prologue.behind_BTF is None else prologue.behind_BTF


def _strides(prologue: Prologue) -> tuple[int, ...]:
    """Of images and rows of both parts, and where the second begins."""
    x, behind = _pointers(prologue)
    return x.stride(0), x.stride(1), behind.stride(0), behind.stride(1), x.shape[-1]


def _round_rows(
    z_MK: Tensor,
    c_MR: Tensor | None,
    amax_M: Tensor,
    codes_MK: Tensor,
    scale_MG: Tensor,
    spec: QuantSpec,
    behind: int | None,
    bias: bool,
    s: Sweep,
) -> None:
    m, k = len(z_MK), spec.width
    n_col = triton.cdiv(padded(k), s.width)
    configs.round_rows(spec, capability(z_MK.device), s, columns=behind, bias=bias).launch(
        (triton.cdiv(m, s.bm) * n_col,),
        z_MK, z_MK if c_MR is None else c_MR, amax_M, codes_MK, scale_MG, m, k, z_MK.stride(0),
        codes_MK.stride(0), scale_MG.stride(0), padded(k), n_col, BIAS_COEFFICIENT if bias else 0.0,
    )  # fmt: skip


def _dense(
    x_MD: Tensor, p_DR: Tensor | None, t_DK: Tensor | None, width: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """z = x T in R1 order, the bits of each row's largest |z|, and c: library products."""
    assert t_DK is not None
    columns = permuted_columns(width, x_MD.device)
    z = x_MD @ t_DK.to(x_MD.dtype)[:, columns.clamp_max(width - 1)]
    z[:, columns >= width] = 0
    amax = z.abs().amax(1).float().view(torch.int32)
    return z, amax, None if p_DR is None else _padded(x_MD @ p_DR.to(x_MD.dtype))


def _project_outside(
    prologue: Prologue, p_DR: Tensor | None, spec: QuantSpec
) -> tuple[Prologue, Tensor | None]:
    """x - c Pᵀ and c by library products where the rank is too large for ``rotate``."""
    if p_DR is None or not _beyond(spec):
        return prologue, None
    x_MD, p = prologue.x_BTD.flatten(0, 1), p_DR.to(prologue.x_BTD.dtype)
    c = x_MD @ p
    return plain((x_MD - c @ p.mT)[None]), _padded(c)


def _padded(c_MR: Tensor) -> Tensor:
    return torch.nn.functional.pad(c_MR, (0, width_of_c(c_MR.shape[1]) - c_MR.shape[1]))
