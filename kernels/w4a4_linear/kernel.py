"""Triton engine of ``w4a4_linear``: main term, low-rank branch and bias in one accumulator.

Codes stand in layout R1 (``kernels/permuted.py``). Letters: M rows, N outputs, K main-branch width,
R low-rank directions, G groups.
"""

import itertools
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..buffers import Codes, Packed
from ..build import CHIPS, FP8_CHIPS, Build, Config
from ..chip import processors
from ..formats.weight import Element
from ..permuted import padded
from .packed import packed_kernel
from .tiles import TILES, Tile, Variant, fits, packed_fits, scales_fit, step
from .unpacked import tma_kernel, unpacked_kernel

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""By an interpreter that computes nonsense in bf16."""


def launch(
    x: Codes,
    packed: Packed,
    weights_NK: Tensor | None = None,
    *,
    width: int,
    out_dtype: torch.dtype,
    tile: Tile,
    element: Element = "int4",
    out: Tensor | None = None,
) -> Tensor:
    """Compute y = s_x s_w (q_x q_wᵀ) + c (WP)ᵀ + bias on the GPU; specification: ``reference.py``.

    x           codes in layout R1, [M, padded(width)]; further columns are ignored, rows may lie
                any distance apart; scales [M, 1] or one per group; c bf16 or fp16
    packed      weights of ``element`` in layout L1, with bf16 scales [N, 1] or one per group
    weights_NK  the weights unpacked (``unpack_w4``): codes of x's dtype in layout R1,
                [N, padded(width)], FP8 ones times 2^-9; None decodes the packed ones on the way
    width       columns of the main branch (K)
    out_dtype   of y: bf16, fp16 or float32
    out         [M, N] to write to, of ``out_dtype`` and with neighbouring columns; None: a new one
    returns     y, [M, N]

    ``tile.tma`` asks for the persistent kernel where it applies: unpacked weights, one scale per
    row on both sides, and addresses that are multiples of 16 bytes. Elsewhere the same tile runs
    without it, with the same result.

    Raises ValueError for group scales that the kernels can't read (``scales_fit``), and for packed
    weights of a width that is no multiple of 8 (``packed_fits``).
    """
    (M, N), codes_MK = (x.codes.shape[0], packed.wscale.shape[0]), x.codes
    act_groups, weight_groups = x.scale.shape[1], packed.wscale.shape[1]
    if not scales_fit(width, act_groups, weight_groups):
        raise ValueError(
            f"{act_groups} activation and {weight_groups} weight scales per row of {width} columns "
            "do not fit the kernels; use one per row, or groups of a multiple of 64 columns, or "
            "the reference path"
        )
    if weights_NK is None and not packed_fits(width):
        raise ValueError(
            f"packed weights are {width} columns wide, and the kernel reads 8 columns at a time; "
            "pass them unpacked (weights_NK), or use the reference path"
        )
    y_MN = codes_MK.new_empty(M, N, dtype=out_dtype) if out is None else out
    if y_MN.numel() == 0:
        return y_MN
    made = config(
        tile, width, act_groups, weight_groups, rank=0 if x.c is None else x.c.shape[1],
        bias=packed.bias is not None, fp8=codes_MK.dtype == torch.float8_e4m3fn,
        half=x.c is not None and x.c.dtype == torch.float16, packed=weights_NK is None,
        lm4=element == "lm4",
    )  # fmt: skip
    programs = triton.cdiv(M, tile.bm) * triton.cdiv(N, tile.bn)
    columns = padded(width)
    with torch.cuda.device_of(codes_MK):
        if weights_NK is not None and tile.tma and act_groups == weight_groups == 1:
            operands = codes_MK[:, :columns], weights_NK[:, :columns], y_MN
            if all(map(_tma_reads, operands)) and y_MN.element_size() == 2:
                _launch_tma(*operands, x, packed, programs, tile, persistent(made))
                return y_MN
        weights = packed.qweight.view(torch.uint32) if weights_NK is None else weights_NK
        made.launch(
            (programs,),
            codes_MK, x.scale, x.c, weights, packed.wscale, packed.wp, packed.bias, y_MN, M, N,
            width // 2 if weights_NK is None else columns, codes_MK.stride(0), x.scale.stride(0),
            _row_stride(x.c), weights.stride(0), packed.wscale.stride(0), _row_stride(packed.wp),
            y_MN.stride(0),
        )  # fmt: skip
    return y_MN


def _launch_tma(
    codes_MK: Tensor, weights_NK: Tensor, y_MN: Tensor, x: Codes, packed: Packed, tiles: int,
    tile: Tile, made: Config,
) -> None:  # fmt: skip
    made.launch(
        (min(tiles, processors(codes_MK.device)),),
        TensorDescriptor.from_tensor(codes_MK, [tile.bm, tile.bk]), x.scale, x.c,
        TensorDescriptor.from_tensor(weights_NK, [tile.bn, tile.bk]), packed.wscale, packed.wp,
        packed.bias, TensorDescriptor.from_tensor(y_MN, [tile.bm, tile.bn // 2]), *y_MN.shape,
        codes_MK.shape[1], x.scale.stride(0), _row_stride(x.c), packed.wscale.stride(0),
        _row_stride(packed.wp),
    )  # fmt: skip


def config(
    tile: Tile,
    width: int,
    act_groups: int,
    weight_groups: int,
    *,
    rank: int,
    bias: bool,
    fp8: bool,
    packed: bool,
    lm4: bool,
    half: bool = False,
) -> Config:
    """Configure K ``width`` with so many scales per row; ``half``: c is fp16, not bf16.

    packed  the weights are nibbles; if not, they are unpacked (:func:`persistent` is for those too)
    """
    act_group = width // act_groups if act_groups > 1 else 0
    weight_group = width // weight_groups if weight_groups > 1 else 0
    bk = step(tile, act_group, weight_group)
    inner, inner_step = (width // 2, bk // 2) if packed else (padded(width), bk)
    dot = tl.float16 if half else tl.bfloat16  # c's, so that nothing of c is lost
    constants = {
        "R": rank, "BIAS": bias, "FP8": fp8, "LM4": lm4, "DOT": tl.float32 if INTERPRETED else dot,
        "BM": tile.bm, "BN": tile.bn, "BK": bk, "GROUP_M": tile.group_m, "ACT_GROUP": act_group,
        "WEIGHT_GROUP": weight_group, "EVEN": inner % inner_step == 0,
    }  # fmt: skip
    kernel = packed_kernel if packed else unpacked_kernel
    return Config(kernel=kernel, constants=constants, warps=tile.warps, stages=tile.stages)


def persistent(unpacked: Config) -> Config:
    """Return the same product through the tensor memory accelerator."""
    constants = {k: v for k, v in unpacked.constants.items() if k in tma_kernel.arg_names}
    return replace(unpacked, kernel=tma_kernel, constants=constants)


def _row_stride(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)


def _tma_reads(matrix: Tensor) -> bool:
    """Tell whether a descriptor can address ``matrix``: row starts at multiples of 16 bytes."""
    row = matrix.stride(0) * matrix.element_size()
    return matrix.data_ptr() % 16 == 0 and row % 16 == 0 and matrix.stride(1) == 1


def builds() -> list[Build]:
    """List every kernel and configuration that runs, in both containers: rank 64, bias, bf16.

    Masks for widths that are no whole number of steps, and rank 0 without bias, are compiled with
    each variant's first tile. LM4 is compiled where it is decoded: elsewhere it is a factor.
    """
    found = []
    for variant, tiles in TILES.items():
        for tile, fp8 in itertools.product(tiles, (False, True)):
            found.append(_build(variant, tile, fp8=fp8))
            if variant in ("packed", "grouped"):
                found.append(_build(variant, tile, fp8=fp8, lm4=True))
            if tile is tiles[0]:
                found.append(_build(variant, tile, fp8=fp8, plain=True))
                if variant in ("packed", "unpacked"):
                    found.append(_build(variant, tile, fp8=fp8, even=False))
    return [build for build in found if build.chips]


def _build(
    variant: Variant,
    tile: Tile,
    *,
    fp8: bool,
    lm4: bool = False,
    even: bool = True,
    plain: bool = False,
) -> Build:
    grouped = variant == "grouped"
    chips = FP8_CHIPS if fp8 else CHIPS
    width = 3072 if even else 2240
    groups = width // 64 if grouped else 1
    made = config(
        tile, width, groups, groups, rank=0 if plain else 64, bias=not plain, fp8=fp8,
        packed=variant in ("packed", "grouped"), lm4=lm4,
    )  # fmt: skip
    if variant == "tma":
        made = persistent(made)
    given: dict[str, Any] = {} if grouped else {"scale_stride": 1, "wscale_stride": 1}
    if plain:
        absent = dict.fromkeys(("c_ptr", "wp_ptr", "bias_ptr"))
        given |= absent | {"c_stride": 0, "wp_stride": 0}
    code = "fp8e4nv" if fp8 else "i8"
    types = {
        "codes_ptr": f"*{code}",
        "weight_ptr": "*u32" if made.kernel is packed_kernel else f"*{code}",
        "y_ptr": "*bf16",
        "scale_ptr": "*fp32",
        "codes": f"tensordesc<{code}[{tile.bm}, {tile.bk}]>",
        "weight": f"tensordesc<{code}[{tile.bn}, {tile.bk}]>",
        "y": f"tensordesc<bf16[{tile.bm}, {tile.bn // 2}]>",
    } | dict.fromkeys(("c_ptr", "wscale_ptr", "wp_ptr", "bias_ptr"), "*bf16")
    size = f"{tile.bm}x{tile.bn}x{made.constants['BK']}-w{tile.warps}-s{tile.stages}"
    return Build.of(
        made,
        types,
        aligned=[n for n in made.kernel.arg_names if n not in ("codes", "weight", "y")],
        given=given,
        name=f"w4a4_{made.kernel.__name__}-{code}-{size}"
        + ("-lm4" if lm4 else "")
        + ("-grouped" if grouped else "")
        + ("" if even else "-masked")
        + ("-plain" if plain else ""),
        chips=tuple(chip for chip in chips if fits(tile, variant, chip, fp8=fp8)),
        spills=2 if lm4 and not fp8 else 0,  # signs take registers: 64 x 128 on sm_80 has none left
    )
