"""Triton engine of ``transform_quantize``: launches the sweeps (sweeps.py) on real tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import CHIPS, FP8_CHIPS, Build, shared_bytes
from ..chip import capability, processors
from ..planar import padded, planar_columns
from ..source import Kind, Source, plain
from ..spec import POW2_LEVELS, QuantSpec
from ..tail import BIAS_COEFFICIENT, columns_with_tail, tail_part
from . import projection
from . import sweeps as kernels
from .limits import why_not
from .reference import POW2_CLIP, TINY

INTERPRETED = bool(triton.knobs.runtime.interpret)
DOTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MAX_RANK = 128
"""Largest rank that ``rotate`` projects out; above it, plain matrix products do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Launch shape: rows and columns per step, warps, pipeline stages, programs per SM."""

    bm: int
    width: int = 0
    """Columns: of a step of ``project``, of a program of ``round_rows``. ``rotate``: four tiles."""
    warps: int = 4
    stages: int = 3
    per_sm: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweeps:
    project: Sweep
    rotate: Sweep
    round_rows: Sweep


DEFAULT: Mapping[Kind, Sweeps] = {
    "plain": Sweeps(
        project=Sweep(bm=64, width=128, stages=5),
        rotate=Sweep(bm=32, stages=3, per_sm=2),
        round_rows=Sweep(bm=4, width=512),
    ),
    "gelu": Sweeps(
        project=Sweep(bm=64, width=128, stages=4, per_sm=2),
        rotate=Sweep(bm=64, stages=2, per_sm=2),
        round_rows=Sweep(bm=4, width=512),
    ),
    "concat": Sweeps(
        project=Sweep(bm=64, width=128, stages=3, per_sm=4),
        rotate=Sweep(bm=128, stages=2, warps=8),
        round_rows=Sweep(bm=4, width=512),
    ),
}
"""On Hopper, by what the sweeps compute on the way in; measured on an H100 at FLUX's sizes."""

_SMALL = Sweeps(
    project=Sweep(bm=32, width=64, stages=3, per_sm=2),
    rotate=Sweep(bm=32, stages=2, per_sm=2),
    round_rows=Sweep(bm=4, width=512),
)
_SMALL_PLAIN = replace(DEFAULT["plain"], project=Sweep(bm=64, width=64, stages=4))


def usual(kind: Kind, chip: int | None) -> Sweeps:
    """The sweeps of a source on compute capability ``chip``: on others than Hopper, what their
    registers hold."""
    if chip in (None, 90) or (kind == "plain" and chip == 100):
        return DEFAULT[kind]
    return _SMALL_PLAIN if kind == "plain" else _SMALL


def fits(spec: QuantSpec) -> bool:
    """Whether the kernels know this spec; others stay on the reference path."""
    return why_not(spec) is None


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
    by_row = spec.act_scale != "group"
    last = DEFAULT["plain"] if sweeps is None else sweeps
    codes = new((m, columns_with_tail(k, r, bias) if tail else padded(k)), dtype=container)
    scale = new((m, 1 if by_row else k // spec.act_group_size), dtype=torch.float32)
    if spec.transform == "dense":
        z, amax, c = _dense(source.value().reshape(m, -1), p_DR, t_DK, k)
    else:
        source, outside = _project_outside(_computed(source, p_DR, spec), p_DR, spec)
        inside = p_DR is not None and outside is None
        z, amax = new((m, padded(k))), new((m,), dtype=torch.int32)
        c = new((m, _width_of_c(r))) if inside else outside
        spread = new((_tiles(spec) * _tile(spec), _width_of_c(r))) if inside else z
        _project_and_rotate(
            source, p_DR if inside else None, spec, c, spread, z, amax,
            sweeps or usual(source.kind, capability(source.x_BTD.device)),
        )  # fmt: skip
    _round_rows(z, c, amax, codes, scale, spec, tail, bias, last.round_rows)
    return codes, scale, None if tail or c is None else c[:, :r]


def _computed(source: Source, p_DR: Tensor | None, spec: QuantSpec) -> Source:
    """The source as the sweeps read it: what they can't do on the way in is done here."""
    split = source.x_BTD.shape[-1]
    torn = source.kind == "concat" and split % (4 * _tile(spec))
    if source.kind == "norm":
        return plain(_normalized(source.laid_out()))
    return plain(source.value()) if _beyond(p_DR, spec) or torn else source.laid_out()


def _beyond(p_DR: Tensor | None, spec: QuantSpec) -> bool:
    """Whether there are more directions than ``rotate`` projects out."""
    return p_DR is not None and spec.rank > (64 if spec.block == 512 else MAX_RANK)


def _normalized(source: Source) -> Tensor:
    """y [1, M, D] of a ``norm``."""
    x, scale, shift = source.x_BTD, source.scale_BD, source.shift_BD
    assert scale is not None and shift is not None
    y_1MD = x.new_empty((1, source.rows, x.shape[-1]))
    width = triton.next_power_of_2(x.shape[-1])
    projection.normalize[(source.rows,)](
        x, scale, shift, y_1MD, x.shape[1], x.shape[2], x.stride(0), x.stride(1), scale.stride(0),
        source.eps, BD=width, num_warps=min(16, max(1, width // 1024)),
    )  # fmt: skip
    return y_1MD


def _project_and_rotate(
    source: Source,
    p_DR: Tensor | None,
    spec: QuantSpec,
    c_MR: Tensor | None,
    spread_DR: Tensor,
    z_MK: Tensor,
    amax_M: Tensor,
    sweeps: Sweeps,
) -> None:
    """Fill z, the bits of each row's largest |z| and, given P, c and the spread basis."""
    x, m, d = source.x_BTD, source.rows, source.channels
    tile, rp = _tile(spec), _width_of_c(spec.rank)
    half = tl.float32 if INTERPRETED else DOTS[x.dtype]
    chain = _chained(x)
    room = shared_bytes(capability(x.device) or CHIPS[-1])
    block = {"B": min(spec.block, tile), "W": tile, "DOT": half, "CHAIN": chain}
    block["FAST"] = not INTERPRETED
    if p_DR is None:
        amax_M.zero_()
    else:
        s = _project(sweeps, spec.rank, room)
        blocks = triton.cdiv(x.shape[1], s.bm)
        n_main = x.shape[0] * blocks
        parts, part = _parts(x, n_main, d, s)
        products = x.new_empty((parts, m, rp), dtype=torch.float32) if parts > 1 else c_MR
        projection.project[(n_main * parts + _tiles(spec),)](
            *_pointers(source), p_DR, products, spread_DR, amax_M,
            m, x.shape[1], d, *_strides(source), blocks, n_main, part,
            R=spec.rank, RP=rp, EVEN=d % s.width == 0, BM=s.bm, BK=s.width, PARTS=parts,
            KIND=source.kind, **block,
            num_warps=s.warps, num_stages=s.stages,
        )  # fmt: skip
        if parts > 1:
            projection.gather[(triton.cdiv(m, 16),)](
                products, c_MR, amax_M, m, RP=rp, PARTS=parts, BM=16, CHAIN=chain,
                num_warps=4, launch_pdl=chain,
            )  # fmt: skip
    s = _rotate(sweeps, spec.block, spec.rank if p_DR is not None else 0, room)
    n_col, blocks = triton.cdiv(d, 4 * tile), triton.cdiv(x.shape[1], s.bm)
    n_row = x.shape[0] * blocks
    kernels.rotate[(_programs(x, n_row, n_col, s),)](
        *_pointers(source), x if c_MR is None else c_MR, spread_DR, z_MK, amax_M,
        m, x.shape[1], d, *_strides(source), z_MK.stride(0), n_col, blocks, n_row,
        spec.block**-0.5,
        SUB=max(1, spec.block // tile), RP=rp, PROJECT=p_DR is not None,
        EVEN=d % (4 * tile) == 0, BM=s.bm, KIND=source.kind, **block,
        num_warps=s.warps, num_stages=s.stages, launch_pdl=chain and p_DR is not None,
    )  # fmt: skip


def _pointers(source: Source) -> tuple[Tensor, Tensor]:
    return source.x_BTD, source.x_BTD if source.behind_BTF is None else source.behind_BTF


def _strides(source: Source) -> tuple[int, ...]:
    """Of images and rows of both parts, and where the second begins."""
    x, behind = _pointers(source)
    return x.stride(0), x.stride(1), behind.stride(0), behind.stride(1), x.shape[-1]


def _parts(x: Tensor, programs: int, d: int, s: Sweep) -> tuple[int, int]:
    """Into how many parts of how many columns ``project`` is cut, so that it fills the chip."""
    steps = triton.cdiv(d, s.width)
    wanted = processors(x.device) * s.per_sm // max(programs, 1)
    part = triton.cdiv(steps, max(1, min(wanted, steps // 3)))
    return triton.cdiv(steps, part), part * s.width


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
    chain = _chained(z_MK) and spec.transform == "hadamard"
    kernels.round_rows[(triton.cdiv(m, s.bm) * n_col,)](
        z_MK, z_MK if c_MR is None else c_MR, amax_M, codes_MK, scale_MG, m, k, z_MK.stride(0),
        codes_MK.stride(0), scale_MG.stride(0), padded(k), n_col,
        BIAS_COEFFICIENT if bias else 0.0,
        R=r, RP=_width_of_c(r), RT=max(tail_part(r, bias), 1),
        TAIL=tail, T=triton.next_power_of_2(behind) if behind else 0,
        SCALE=spec.act_scale, G=64 if spec.act_scale == "token" else spec.act_group_size,
        QMAX=2 ** (spec.act_bits - 1) - 1,
        UNIT=2.0**POW2_LEVELS if spec.act_scale == "pow2" else 1.0,
        LEVELS=POW2_LEVELS, CLIP=POW2_CLIP, TINY=TINY, BM=s.bm, BW=s.width,
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
    if p_DR is None or not _beyond(p_DR, spec):
        return source, None
    x_MD, p = source.x_BTD.flatten(0, 1), p_DR.to(source.x_BTD.dtype)
    c = x_MD @ p
    return plain((x_MD - c @ p.mT)[None]), _padded(c)


def _tile(spec: QuantSpec) -> int:
    """Columns of a tile of ``rotate``."""
    return 128 if spec.block == 512 else 64


def _tiles(spec: QuantSpec) -> int:
    return triton.cdiv(spec.dim, _tile(spec))


def _width_of_c(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def _padded(c_MR: Tensor) -> Tensor:
    return torch.nn.functional.pad(c_MR, (0, _width_of_c(c_MR.shape[1]) - c_MR.shape[1]))


def _project(sweeps: Sweeps, rank: int, room: int) -> Sweep:
    s = sweeps.project
    return _stages_within(s, 2 * s.width * (s.bm + _width_of_c(rank)), 0, room)


def _rotate(sweeps: Sweeps, block: int, rank: int, room: int) -> Sweep:
    s, w, rp = sweeps.rotate, 64, _width_of_c(rank) if rank else 0
    if block == 512:  # tiles are twice as wide: the same registers for twice the threads
        s, w = replace(s, warps=2 * s.warps, per_sm=1), 128
    return _stages_within(s, 2 * s.bm * (4 * w + rp), 2 * w * (4 * rp + w), room)


def _stages_within(s: Sweep, each: int, fixed: int, room: int) -> Sweep:
    """``s`` with as many of its stages (``each`` bytes) as fit into ``room`` beside ``fixed``."""
    return replace(s, stages=max(1, min(s.stages, (room - fixed) // each)))


def _chained(x: Tensor) -> bool:
    """Whether the sweeps may overlap at their ends (programmatic dependent launch)."""
    return (capability(x.device) or 0) >= 90


def _programs(x: Tensor, n_row: int, n_col: int, sweep: Sweep) -> int:
    """A multiple of the column blocks that fills the chip, at most one program per row block."""
    slots = processors(x.device) * sweep.per_sm
    return n_col * max(1, min(n_row, slots // n_col))


def builds() -> list[Build]:
    """Every sweep in the configurations that run: b = 64 ... 512, each scale, both containers."""
    found = []
    pointers = {
        "p_x": "*bf16", "p_basis": "*bf16", "p_c": "*bf16", "p_spread": "*bf16", "p_z": "*bf16",
        "p_amax": "*i32", "p_scale": "*fp32", "root": "fp32", "one": "fp32",
    }  # fmt: skip
    reads = {
        "p_behind": "*bf16", "p_scale": "*bf16", "p_shift": "*bf16", "p_y": "*bf16",
        "p_parts": "*fp32", "eps": "fp32",
    }  # fmt: skip

    def add(name: str, kernel: Any, constants: dict[str, Any], s: Sweep, **more: Any) -> None:
        types = pointers | more.pop("types", {})
        signature = {n: types.get(n, "i32") for n in kernel.arg_names if n not in constants}
        aligned = (
            "M", "T", "D", "K", "image_x", "stride_x", "image_behind", "stride_behind",
            "stride_scale", "split", "stride_z", "stride_codes", "tail",
        )  # fmt: skip
        found.append(
            Build(
                name=f"transform_quantize_{name}", kernel=kernel, signature=signature,
                constants=constants, warps=s.warps, stages=s.stages,
                aligned=tuple(n for n in signature if n in aligned or n.startswith("p_")), **more,
            )
        )  # fmt: skip

    for chips in ((80,), (86, 89, 120), (90,), (100,)):
        room = shared_bytes(chips[0])
        for b, rank, even in ((256, 64, True), (32, 64, False), (512, 64, True), (256, 128, True)):
            tile, rp = 128 if b == 512 else 64, _width_of_c(rank)
            shared = {"B": min(b, tile), "W": tile, "RP": rp, "EVEN": even, "DOT": tl.bfloat16}
            shared |= {"CHAIN": False, "FAST": True}
            kinds: tuple[Kind, ...] = ("plain", "gelu", "concat")
            for kind in kinds if b == 256 and rank == 64 else kinds[:1]:
                shared["KIND"] = kind
                after = "" if kind == "plain" else f"-{kind}"
                s = _project(usual(kind, chips[0]), rank, room)
                for parts in (1, 4):
                    constants = {**shared, "R": rank, "BM": s.bm, "BK": s.width, "PARTS": parts}
                    types = reads | ({"p_c": "*fp32"} if parts > 1 else {})
                    name = f"project-b{b}-r{rank}{after}-{parts}"
                    add(name, projection.project, constants, s, chips=chips, types=types)
                for r in (rank, 0) if rank == 64 and kind == "plain" else (rank,):
                    s = _rotate(usual(kind, chips[0]), b, r, room)
                    constants = {**shared, "SUB": max(1, b // tile), "PROJECT": r > 0, "BM": s.bm}
                    name = f"rotate-b{b}-r{r}{after}"
                    add(name, kernels.rotate, constants, s, chips=chips, types=reads)
    plain_sweep = Sweep(bm=16)
    add(
        "gather", projection.gather, {"RP": 64, "PARTS": 4, "BM": 16, "CHAIN": False}, plain_sweep,
        types=reads, tensor_core=False,
    )  # fmt: skip
    add(
        "normalize", projection.normalize, {"BD": 4096}, plain_sweep, types=reads, tensor_core=False
    )
    s = DEFAULT["plain"].round_rows
    for scale, g, bits, fp8, tail in (
        ("pow2", 16, 4, True, True), ("pow2", 64, 4, True, True), ("token", 64, 4, True, True),
        ("pow2", 16, 4, False, False), ("token", 64, 8, False, False),
        ("group", 64, 4, True, False), ("group", 128, 4, False, False),
    ):  # fmt: skip
        constants = {
            "R": 64, "RP": 64, "RT": 80, "TAIL": tail, "T": 256 if tail else 0,
            "SCALE": scale, "G": g,
            "QMAX": 2 ** (bits - 1) - 1, "UNIT": 1.0, "LEVELS": POW2_LEVELS, "CLIP": POW2_CLIP,
            "TINY": TINY, "BM": s.bm, "BW": s.width, "CHAIN": False,
        }  # fmt: skip
        add(
            f"round-{scale}{g}-{bits}-{'fp8' if fp8 else 'int8'}", kernels.round_rows, constants, s,
            types={"p_codes": "*fp8e4nv" if fp8 else "*i8"}, tensor_core=False,
            chips=FP8_CHIPS if fp8 else CHIPS,
        )  # fmt: skip
    return found
