"""Triton ``fp4_linear``: FP4 products, by the chip where it has them, low-rank branch and bias.

The specification is that of ``w4a4_linear`` and ``w4a16_linear``, for weights in layout L2.
Letters: M rows, N outputs, K main-branch width, R low-rank directions, G columns of a group.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..buffers import Fp4Codes, Packed
from ..build import CHIPS, Build, Config
from ..chip import capability
from ..formats.fp4 import GROUPS
from .program import fp4_kernel
from .tiles import TILES, Tile, Variant, fits, step, variant

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""By an interpreter that computes nonsense in bf16."""
HALVES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def launch(
    x: Fp4Codes | Tensor, packed: Packed, *, width: int, out_dtype: torch.dtype, tile: Tile
) -> Tensor:
    """Compute y = x wᵀ + c (WP)ᵀ + bias on the GPU.

    x          bytes of two E2M1 numbers [M, K // 2] and of scales [M, K // G], NVFP4's global scale
               of each row, and c (``transform_quantize.fp4``); or bf16 or fp16, [M, K], any
               strides: without a low-rank branch
    packed     weights in layout L2, with their scales
    width      columns of the main branch (K)
    out_dtype  of y: bf16, fp16 or float32
    returns    y, [M, N], accumulated in float32
    """
    if isinstance(x, Tensor) and x.stride(1) != 1:
        x = x.contiguous()
    given = x if isinstance(x, Fp4Codes) else Fp4Codes(x, x, None, None)
    (M, N), c = (given.codes.shape[0], packed.wscale.shape[0]), given.c
    y_MN = given.codes.new_empty(M, N, dtype=out_dtype)
    if y_MN.numel() == 0:
        return y_MN
    made = config(
        tile, width, "mxfp4" if packed.wglobal is None else "nvfp4",
        capability(y_MN.device), rounded=isinstance(x, Fp4Codes),
        dtype=given.codes.dtype if c is None else c.dtype, rank=0 if c is None else c.shape[1],
        bias=packed.bias is not None,
    )  # fmt: skip
    with torch.cuda.device_of(y_MN):
        made.launch(
            (triton.cdiv(M, tile.bm) * triton.cdiv(N, tile.bn),),
            given.codes, given.scale, given.row, c, packed.qweight, packed.wscale, packed.wglobal,
            packed.wp, packed.bias, y_MN, M, N, width, given.codes.stride(0), given.scale.stride(0),
            _stride(c), packed.qweight.stride(0), packed.wscale.stride(0), _stride(packed.wp),
            y_MN.stride(0),
        )  # fmt: skip
    return y_MN


def config(
    tile: Tile,
    width: int,
    name: str,
    chip: int | None,
    *,
    rounded: bool,
    dtype: torch.dtype,
    rank: int,
    bias: bool,
) -> Config:
    """Configure K ``width`` in the format ``name`` for a chip.

    rounded  x is FP4 and ``dtype`` is c's, if there is a rank; else ``dtype`` is x's

    MXFP4 times MXFP4 is Triton's own product on every chip: it decodes to bf16 where the chip
    can't. NVFP4 it compiles for :data:`.NATIVE` alone (3.6 and 3.7); the interpreter, where
    ``chip`` is None, knows neither.
    """
    half = HALVES.get(dtype, tl.bfloat16)
    dot = tl.bfloat16 if rounded else half
    if name == "mxfp4" and not rounded and dtype == torch.float16:
        dot = tl.float32  # TF32 holds all of fp16 and of powers of two, which fp16 does not
    constants = {
        "R": rank, "G": GROUPS[name], "E4M3": name == "nvfp4", "ROUNDED": rounded,
        "SCALED": rounded and chip is not None and (variant(chip) == "native" or name == "mxfp4"),
        "BIAS": bias, "DOT": tl.float32 if INTERPRETED else dot,
        "LOWRANK": tl.float32 if INTERPRETED else half,
        "EVEN": width % step(tile, width) == 0, "BM": tile.bm, "BN": tile.bn,
        "BK": step(tile, width), "GROUP_M": tile.group_m,
    }  # fmt: skip
    return Config(kernel=fp4_kernel, constants=constants, warps=tile.warps, stages=tile.stages)


def _stride(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)


def builds() -> list[Build]:
    """List every tile in both formats for the chips that it fits: rank 64, bias, bf16, and masked
    steps; rank 0 without bias with the first. For 16-bit activations every tile with bf16, the
    first with fp16, and the last with masked steps."""
    found = []
    for name, kind in itertools.product(GROUPS, TILES):
        for tile in TILES[kind]:
            found.append(_build(name, kind, tile))
            found.append(_build(name, kind, tile, width=2208))
        found.append(_build(name, kind, TILES[kind][0], plain=True))
    first, *_, last = TILES["decoded"]
    for name in GROUPS:
        for tile in TILES["decoded"]:
            found.append(_build(name, "decoded", tile, dtype=torch.bfloat16))
        found.append(_build(name, "decoded", first, dtype=torch.float16))
        found.append(_build(name, "decoded", last, width=2208, dtype=torch.bfloat16))
    return [build for build in found if build is not None]


def _build(
    name: str,
    kind: Variant,
    tile: Tile,
    *,
    width: int = 3072,
    plain: bool = False,
    dtype: torch.dtype | None = None,
) -> Build | None:
    """``dtype``: of activations in 16 bits, None: they are FP4."""
    rounded = dtype is None
    plain = plain or not rounded
    chips = tuple(
        chip for chip in CHIPS
        if (not rounded or variant(chip) == kind) and fits(tile, kind, chip, width)
    )  # fmt: skip
    if not chips:
        return None
    made = config(
        tile, width, name, chips[0], rounded=rounded, dtype=dtype or torch.bfloat16,
        rank=0 if plain else 64, bias=not plain,
    )  # fmt: skip
    given: dict[str, Any] = {}
    if plain:
        given |= dict.fromkeys(("c_ptr", "wp_ptr", "bias_ptr")) | {"c_stride": 0, "wp_stride": 0}
    if name == "mxfp4":
        given |= {"wglobal_ptr": None}
    if name == "mxfp4" or not rounded:
        given |= {"row_ptr": None}
    x = "*u8" if dtype is None else f"*{HALVES[dtype]}"
    types = {"x_ptr": x, "xscale_ptr": x, "y_ptr": "*bf16" if rounded else x}
    types |= dict.fromkeys(("weight_ptr", "wscale_ptr"), "*u8")
    types |= dict.fromkeys(("c_ptr", "wp_ptr", "bias_ptr"), "*bf16")
    types |= dict.fromkeys(("row_ptr", "wglobal_ptr"), "*fp32")
    sums = tile.bm * tile.bn // (32 * tile.warps)
    return Build.of(
        made, types, given=given, chips=chips, spills=16 if sums == 128 else 0,
        aligned=[n for n in fp4_kernel.arg_names if n not in {*made.constants, *given}],
        name=f"{name}-{kind}-{x[1:]}-{tile.bm}x{tile.bn}x{made.constants['BK']}-w{tile.warps}"
        f"-s{tile.stages}-k{width}{'-plain' if plain else ''}",
    )  # fmt: skip
