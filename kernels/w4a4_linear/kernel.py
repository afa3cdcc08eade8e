"""Triton engine of ``w4a4_linear``: main term, protected branch and bias in one accumulator.

Codes stand in layout R1 (``kernels/planar.py``). Letters: M rows, N outputs, K main-branch width,
R protected directions, G groups.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..build import CHIPS, FP8_CHIPS, Build
from ..chip import processors
from ..planar import padded
from .packed import packed_kernel
from .tiles import TILES, Tile, Variant, fits, packed_fits, scales_fit, step
from .unpacked import tma_kernel, unpacked_kernel

__all__ = ["TILES", "Tile", "Variant", "builds", "fits", "launch", "packed_fits", "scales_fit"]


def launch(
    codes_MK: Tensor,
    scale_MG: Tensor,
    c_MR: Tensor | None,
    qweight_NK2: Tensor,
    wscale_NG: Tensor,
    wp_NR: Tensor | None,
    bias_N: Tensor | None,
    *,
    width: int,
    out_dtype: torch.dtype,
    tile: Tile,
    weights_NK: Tensor | None = None,
    out: Tensor | None = None,
    precise: bool = False,
) -> Tensor:
    """y = s_x s_w (q_x q_wᵀ) + c (WP)ᵀ + bias on the GPU; specification: ``reference.py``.

    codes_MK     int8 or float8_e4m3fn activation codes in layout R1, [M, padded(width)]; further
                 columns are ignored, rows may lie any distance apart
    scale_MG     float32, [M, 1] or one per group
    c_MR         bf16 or fp16, [M, R]; None at rank 0
    qweight_NK2  uint8, [N, width // 2], layout L1
    wscale_NG    bf16, [N, 1] or one per group
    wp_NR        bf16, [N, R]; None at rank 0
    bias_N       bf16, [N] or None
    width        columns of the main branch (K)
    out_dtype    of y: bf16, fp16 or float32
    weights_NK   the weights unpacked (``unpack_w4``): codes of ``codes_MK``'s dtype in layout R1,
                 [N, padded(width)], FP8 ones times 2^-9; None decodes ``qweight_NK2`` on the way
    out          [M, N] to write to, of ``out_dtype`` and with neighbouring columns; None: a new one
    precise      add up FP8 products in float32 every 32 columns: Hopper alone keeps fewer bits
    returns      y, [M, N]

    ``tile.tma`` asks for the persistent kernel where it applies: unpacked weights, one scale per
    row on both sides, and addresses that are multiples of 16 bytes. Elsewhere the same tile runs
    without it, with the same result.

    Raises ValueError for group scales that the kernels can't read (``scales_fit``), and for packed
    weights of a width that is no multiple of 8 (``packed_fits``).
    """
    M, N = codes_MK.shape[0], wscale_NG.shape[0]
    act_groups, weight_groups = scale_MG.shape[1], wscale_NG.shape[1]
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
    fp8 = codes_MK.dtype == torch.float8_e4m3fn
    act_group = width // act_groups if act_groups > 1 else 0
    weight_group = width // weight_groups if weight_groups > 1 else 0
    BK = step(tile, act_group, weight_group)
    shared: dict[str, Any] = {
        "R": 0 if c_MR is None else c_MR.shape[1],
        "BIAS": bias_N is not None,
        "FP8": fp8,
        "DOT": _dot_type(c_MR),
        "IMPRECISE": 32 if precise and fp8 else None,
        **_tile_constants(tile, BK),
    }
    grouped = act_group + weight_group > 0
    programs = triton.cdiv(M, tile.bm) * triton.cdiv(N, tile.bn)
    columns = padded(width)
    with torch.cuda.device_of(codes_MK):
        if weights_NK is not None and tile.tma and not grouped:
            operands = codes_MK[:, :columns], weights_NK[:, :columns], y_MN
            if all(map(_tma_reads, operands)) and y_MN.element_size() == 2:
                _launch_tma(
                    *operands, scale_MG, c_MR, wscale_NG, wp_NR, bias_N, programs, tile, shared
                )
                return y_MN
        packed = weights_NK is None
        weights = qweight_NK2.view(torch.uint32) if weights_NK is None else weights_NK
        inner = width // 2 if packed else columns
        kernel = packed_kernel if packed else unpacked_kernel
        kernel[(programs,)](
            codes_MK,
            scale_MG,
            c_MR,
            weights,
            wscale_NG,
            wp_NR,
            bias_N,
            y_MN,
            M,
            N,
            inner,
            codes_MK.stride(0),
            scale_MG.stride(0),
            0 if c_MR is None else c_MR.stride(0),
            weights.stride(0),
            wscale_NG.stride(0),
            0 if wp_NR is None else wp_NR.stride(0),
            y_MN.stride(0),
            ACT_GROUP=act_group,
            WEIGHT_GROUP=weight_group,
            EVEN=inner % (BK // 2 if packed else BK) == 0,
            **shared,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return y_MN


def _launch_tma(
    codes_MK: Tensor,
    weights_NK: Tensor,
    y_MN: Tensor,
    scale_MG: Tensor,
    c_MR: Tensor | None,
    wscale_NG: Tensor,
    wp_NR: Tensor | None,
    bias_N: Tensor | None,
    tiles: int,
    tile: Tile,
    shared: Mapping[str, Any],
) -> None:
    tma_kernel[(min(tiles, processors(codes_MK.device)),)](
        TensorDescriptor.from_tensor(codes_MK, [tile.bm, tile.bk]),
        scale_MG,
        c_MR,
        TensorDescriptor.from_tensor(weights_NK, [tile.bn, tile.bk]),
        wscale_NG,
        wp_NR,
        bias_N,
        TensorDescriptor.from_tensor(y_MN, [tile.bm, tile.bn // 2]),
        *y_MN.shape,
        codes_MK.shape[1],
        scale_MG.stride(0),
        0 if c_MR is None else c_MR.stride(0),
        wscale_NG.stride(0),
        0 if wp_NR is None else wp_NR.stride(0),
        **shared,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _tma_reads(matrix: Tensor) -> bool:
    """Whether a descriptor can address ``matrix``: row starts at multiples of 16 bytes."""
    row = matrix.stride(0) * matrix.element_size()
    return matrix.data_ptr() % 16 == 0 and row % 16 == 0 and matrix.stride(1) == 1


def _dot_type(c_MR: Tensor | None) -> Any:
    """Operand type of the protected branch: c's, so that nothing of c is lost."""
    if triton.knobs.runtime.interpret:  # which computes nonsense in bf16
        return tl.float32
    return tl.float16 if c_MR is not None and c_MR.dtype == torch.float16 else tl.bfloat16


def _tile_constants(tile: Tile, bk: int) -> dict[str, int]:
    return {"BM": tile.bm, "BN": tile.bn, "BK": bk, "GROUP_M": tile.group_m}


def builds() -> list[Build]:
    """Every kernel and configuration that runs, in both containers: rank 64, bias, bf16.

    Masks for widths that are no whole number of steps, and rank 0 without bias, are compiled with
    each variant's first tile; of unpacked weights, which run where somebody measured them, not for
    Hopper's successors.
    """
    kernels: dict[Variant, tuple[Any, ...]] = {
        "packed": (packed_kernel,),
        "unpacked": (unpacked_kernel,),
        "tma": (tma_kernel,),
        "grouped": (packed_kernel,),
    }
    found = []
    for variant, tiles in TILES.items():
        for kernel, tile, fp8 in itertools.product(kernels[variant], tiles, (False, True)):
            found.append(_build(kernel, variant, tile, fp8=fp8))
            if tile is tiles[0]:
                found.append(_build(kernel, variant, tile, fp8=fp8, plain=True))
                if variant in ("packed", "unpacked"):
                    found.append(_build(kernel, variant, tile, fp8=fp8, even=False))
    return [build for build in found if build.chips]


def _build(
    kernel: Any, variant: Variant, tile: Tile, *, fp8: bool, even: bool = True, plain: bool = False
) -> Build:
    group = 64 if variant == "grouped" else 0
    chips = FP8_CHIPS if fp8 else CHIPS
    if variant == "unpacked" and (plain or not even):
        chips = tuple(chip for chip in chips if chip <= 90)
    constants: dict[str, Any] = {
        "R": 0 if plain else 64,
        "BIAS": not plain,
        "FP8": fp8,
        "DOT": tl.bfloat16,
        "IMPRECISE": None,
        **_tile_constants(tile, step(tile, group, group)),
    }
    if kernel is not tma_kernel:
        constants |= {"ACT_GROUP": group, "WEIGHT_GROUP": group, "EVEN": even}
    if group == 0:
        constants |= {"scale_stride": 1, "wscale_stride": 1}
    if plain:
        absent = dict.fromkeys(("c_ptr", "wp_ptr", "bias_ptr"))
        constants |= absent | {"c_stride": 0, "wp_stride": 0}
    code = "fp8e4nv" if fp8 else "i8"
    types = {
        "codes_ptr": f"*{code}",
        "weight_ptr": "*u32" if kernel is packed_kernel else f"*{code}",
        "y_ptr": "*bf16",
        "scale_ptr": "*fp32",
        "codes": f"tensordesc<{code}[{tile.bm}, {tile.bk}]>",
        "weight": f"tensordesc<{code}[{tile.bn}, {tile.bk}]>",
        "y": f"tensordesc<bf16[{tile.bm}, {tile.bn // 2}]>",
    } | dict.fromkeys(("c_ptr", "wscale_ptr", "wp_ptr", "bias_ptr"), "*bf16")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    size = f"{tile.bm}x{tile.bn}x{constants['BK']}-w{tile.warps}-s{tile.stages}"
    return Build(
        name=f"w4a4_{kernel.__name__}-{code}-{size}"
        + ("-grouped" if group else "")
        + ("" if even else "-masked")
        + ("-plain" if plain else ""),
        kernel=kernel,
        signature=signature,
        constants=constants,
        warps=tile.warps,
        stages=tile.stages,
        chips=tuple(chip for chip in chips if fits(tile, variant, chip, fp8=fp8)),
        aligned=tuple(n for n, kind in signature.items() if not kind.startswith("tensordesc")),
    )
