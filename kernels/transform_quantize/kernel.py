"""Triton engine of ``transform_quantize``: launches the sweeps (sweeps.py) on real tensors."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import CHIPS, FP8_CHIPS, Build
from ..planar import padded, planar_columns
from ..spec import POW2_LEVELS, QuantSpec
from ..tail import BIAS_COEFFICIENT, columns_with_tail, tail_part
from . import sweeps as kernels
from .reference import POW2_CLIP, TINY

INTERPRETED = bool(triton.knobs.runtime.interpret)
DOTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MAX_RANK = 256
"""Largest rank that ``rotate`` projects out; above it, plain matrix products do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Launch shape: rows and columns per step, warps, pipeline stages, programs per SM."""

    bm: int
    width: int = 0
    """Columns: of a step of ``project``, of a program of ``round_rows``; ``rotate`` takes four tiles."""
    warps: int = 4
    stages: int = 3
    per_sm: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweeps:
    project: Sweep
    rotate: Sweep
    round_rows: Sweep


DEFAULT = Sweeps(
    project=Sweep(bm=64, width=128, stages=5),
    rotate=Sweep(bm=32, stages=3, per_sm=3),
    round_rows=Sweep(bm=4, width=512),
)


def fits(spec: QuantSpec) -> bool:
    """Whether the kernels know this spec; others stay on the reference path."""
    group = spec.act_group_size
    whole = spec.act_scale == "token"
    return spec.act_bits < 16 and spec.block <= 512 and (whole or group in (16, 32, 64, 128, 256))


def launch(
    x_MD: Tensor,
    p_DR: Tensor | None,
    t_DK: Tensor | None,
    spec: QuantSpec,
    *,
    container: torch.dtype,
    tail: bool = False,
    bias: bool = False,
    sweeps: Sweeps = DEFAULT,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and c (:func:`.reference.transform_quantize`) as the GEMMs want them.

    x_MD       bf16 or fp16, [M, D], last dim contiguous
    p_DR       bf16, [D, R], contiguous, or None at rank 0
    t_DK       bf16, [D, K]; ``transform="dense"`` only
    container  int8 or float8_e4m3fn: the dtype of codes
    tail       c (and the coefficient of a ``bias``) become columns behind the codes: float8 and one
               scale per row only
    returns    codes [M, padded(K)] in R1 order (``tail``: [M, columns_with_tail(K, R, bias)]), scale
               float32 [M, G], c [M, R] in x's dtype (None at rank 0 or with ``tail``)
    """
    m, d = x_MD.shape
    k, r = spec.width, spec.rank
    rp = max(16, triton.next_power_of_2(r))
    new = x_MD.new_empty
    amax = new((m,), dtype=torch.int32)
    if spec.transform == "dense":
        assert t_DK is not None
        columns = planar_columns(k, x_MD.device)
        z = x_MD @ t_DK.to(x_MD.dtype)[:, columns.clamp_max(k - 1)]
        z[:, columns >= k] = 0
        amax = z.abs().amax(1).float().view(torch.int32)
        c = None if p_DR is None else _padded(x_MD @ p_DR.to(x_MD.dtype), rp)
    else:
        z = new((m, padded(d)))
        c = _project_and_rotate(x_MD, p_DR, spec, z, amax, rp, sweeps)
    by_row = spec.act_scale != "group"
    part = tail_part(r, bias) if tail else 0
    codes = new((m, columns_with_tail(k, r, bias) if tail else padded(k)), dtype=container)
    scale = new((m, 1 if by_row else k // spec.act_group_size), dtype=torch.float32)
    s = sweeps.round_rows
    n_col = triton.cdiv(padded(k), s.width)
    behind = codes.shape[1] - padded(k)
    kernels.round_rows[(triton.cdiv(m, s.bm) * n_col,)](
        z, z if c is None else c, amax, codes, scale, m, k, z.stride(0), codes.stride(0),
        scale.stride(0), padded(k), n_col, BIAS_COEFFICIENT if bias else 0.0,
        R=r, RP=rp, RT=max(part, 1), T=triton.next_power_of_2(behind) if tail else 0,
        SCALE=spec.act_scale, G=64 if spec.act_scale == "token" else spec.act_group_size,
        QMAX=2 ** (spec.act_bits - 1) - 1, UNIT=2.0**POW2_LEVELS if spec.act_scale == "pow2" else 1.0,
        LEVELS=POW2_LEVELS, CLIP=POW2_CLIP, TINY=TINY, BM=s.bm, BW=s.width,
        num_warps=s.warps,
    )  # fmt: skip
    return codes, scale, None if tail or c is None else c[:, :r]


def _project_and_rotate(
    x_MD: Tensor,
    p_DR: Tensor | None,
    spec: QuantSpec,
    z_MK: Tensor,
    amax_M: Tensor,
    rp: int,
    sweeps: Sweeps,
) -> Tensor | None:
    """Fill z and the bits of each row's largest |z|; c [M, RP], or None at rank 0."""
    m, d = x_MD.shape
    tile = 128 if spec.block == 512 else 64
    half = tl.float32 if INTERPRETED else DOTS[x_MD.dtype]
    block = {"B": min(spec.block, tile), "W": tile, "DOT": half}
    c: Tensor | None = None
    inside = p_DR is not None and spec.rank <= MAX_RANK
    if p_DR is not None and inside:
        s = sweeps.project
        c = x_MD.new_empty((m, rp))
        turns, programs = triton.cdiv(d, tile), triton.cdiv(m, s.bm)
        spread = x_MD.new_empty((turns * tile, rp))
        kernels.project[(programs + turns,)](
            x_MD, p_DR, c, spread, amax_M, m, d, x_MD.stride(0), programs,
            R=spec.rank, RP=rp, EVEN=d % s.width == 0, BM=s.bm, BK=s.width, **block,
            num_warps=s.warps, num_stages=s.stages,
        )  # fmt: skip
    else:
        spread = x_MD
        amax_M.zero_()
        if p_DR is not None:
            p = p_DR.to(x_MD.dtype)
            c = _padded(x_MD @ p, rp)
            x_MD = x_MD - c[:, : spec.rank] @ p.mT
    s = _rotate(sweeps, spec.block)
    n_col, n_row = triton.cdiv(d, 4 * tile), triton.cdiv(m, s.bm)
    kernels.rotate[(_programs(x_MD, n_row, n_col, s),)](
        x_MD, x_MD if c is None else c, spread, z_MK, amax_M, m, d, x_MD.stride(0), z_MK.stride(0),
        n_col, n_row, spec.block**-0.5,
        SUB=max(1, spec.block // tile), RP=rp, PROJECT=inside, EVEN=d % (4 * tile) == 0, BM=s.bm,
        **block, num_warps=s.warps, num_stages=s.stages,
    )  # fmt: skip
    return c


def _rotate(sweeps: Sweeps, block: int) -> Sweep:
    """Tiles of block 512 are twice as wide: half the stages keep them in shared memory."""
    return replace(sweeps.rotate, warps=8, stages=1, per_sm=1) if block == 512 else sweeps.rotate


def _programs(x: Tensor, n_row: int, n_col: int, sweep: Sweep) -> int:
    """A multiple of the column blocks that fills the chip, at most one program per row block."""
    sms = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
    return n_col * max(1, min(n_row, sms * sweep.per_sm // n_col))


def _padded(c_MR: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(c_MR, (0, columns - c_MR.shape[1]))


def builds() -> list[Build]:
    """Every sweep in the configurations that run: b = 64 ... 512, each scale, both containers."""
    sweeps, found = DEFAULT, []
    pointers = {
        "p_x": "*bf16", "p_basis": "*bf16", "p_c": "*bf16", "p_spread": "*bf16", "p_z": "*bf16",
        "p_amax": "*i32", "p_scale": "*fp32", "root": "fp32", "one": "fp32",
    }  # fmt: skip

    def add(name: str, kernel: Any, constants: dict[str, Any], s: Sweep, **more: Any) -> None:
        types = pointers | more.pop("types", {})
        signature = {n: types.get(n, "i32") for n in kernel.arg_names if n not in constants}
        aligned = ("M", "D", "K", "stride_x", "stride_z", "stride_codes", "tail")
        found.append(
            Build(
                name=f"transform_quantize_{name}", kernel=kernel, signature=signature,
                constants=constants, warps=s.warps, stages=s.stages,
                aligned=tuple(n for n in signature if n in aligned or n.startswith("p_")), **more,
            )
        )  # fmt: skip

    for b, even in ((256, True), (32, False), (512, True)):
        tile = 128 if b == 512 else 64
        shared = {"B": min(b, tile), "W": tile, "RP": 64, "EVEN": even, "DOT": tl.bfloat16}
        s = sweeps.project
        add(f"project-b{b}", kernels.project, {**shared, "R": 64, "BM": s.bm, "BK": s.width}, s)
        s = _rotate(sweeps, b)
        for project in (True, False):
            constants = {**shared, "SUB": max(1, b // tile), "PROJECT": project, "BM": s.bm}
            add(f"rotate-b{b}-{project}", kernels.rotate, constants, s)
    s = sweeps.round_rows
    for scale, g, bits, fp8, tail in (
        ("pow2", 64, 4, True, True), ("pow2", 32, 4, True, True), ("token", 64, 4, True, True),
        ("pow2", 64, 4, False, False), ("token", 64, 8, False, False),
        ("group", 64, 4, True, False), ("group", 128, 4, False, False),
    ):  # fmt: skip
        constants = {
            "R": 64, "RP": 64, "RT": 80, "T": 256 if tail else 0, "SCALE": scale, "G": g,
            "QMAX": 2 ** (bits - 1) - 1, "UNIT": 1.0, "LEVELS": POW2_LEVELS, "CLIP": POW2_CLIP,
            "TINY": TINY, "BM": s.bm, "BW": s.width,
        }  # fmt: skip
        add(
            f"round-{scale}{g}-{bits}-{'fp8' if fp8 else 'int8'}", kernels.round_rows, constants, s,
            types={"p_codes": "*fp8e4nv" if fp8 else "*i8"}, tensor_core=False,
            chips=FP8_CHIPS if fp8 else CHIPS,
        )  # fmt: skip
    return found
