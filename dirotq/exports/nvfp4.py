"""NVFP4 twice: in the layout of ModelOpt and Black Forest Labs, and in ComfyUI's.

A weight is E2M1 · E4M3 of its group of 16 · one float32. Both layouts hold these numbers.
ModelOpt's are row-major with the even column in the low nibble, as our layout L2; ComfyUI has the
even column in the high nibble, and scales in the tiles of 128 x 4 that matrix units read.

Letters: N outputs, K channels, G groups.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dirotq.exports.awq import AWQ_W4A16
from dirotq.exports.layer_format import (
    LayerFormat,
    activations_in_words,
    plain_misfits,
    weights_in_words,
)
from dirotq.kernels.buffers import Packed
from dirotq.kernels.formats.quantize_weight import dequantize_weight, unpack_weight
from dirotq.kernels.formats.spec import QuantSpec

INPUT_SCALE = 0.25
"""Outer scale of activations, for which packed folders have no calibration: groups of 16 are exact
to E4M3's precision between 0.02 and 670, and scales saturate above."""
ROWS = 16
"""ComfyUI pads outputs to multiples of it."""
TILE = (128, 4)
"""Rows and groups of a tile of scales."""


def _misfits(spec: QuantSpec) -> Iterator[str]:
    yield from plain_misfits(spec)
    if spec.weights.name != "nvfp4":
        yield f"{weights_in_words(spec)} (it has nvfp4)"
    if spec.activations.name != "nvfp4":
        yield f"{activations_in_words(spec)} (it has nvfp4)"


def _comfy_misfits(spec: QuantSpec) -> Iterator[str]:
    yield from _misfits(spec)
    if any(rows % ROWS for rows in spec.out_features):
        yield f"linears of {list(spec.out_features)} outputs (it has multiples of {ROWS})"


def _tensors(packed: Packed, spec: QuantSpec) -> dict[str, Tensor]:
    return {
        "weight": packed.qweight,
        "weight_scale": packed.wscale.view(torch.float8_e4m3fn),
        "weight_scale_2": _global(packed),
        "input_scale": torch.full_like(_global(packed), INPUT_SCALE),
    }


def _comfy_tensors(packed: Packed, spec: QuantSpec) -> dict[str, Tensor]:
    return {
        "weight": (packed.qweight >> 4) | (packed.qweight << 4),
        "weight_scale": in_tiles(packed.wscale).view(torch.float8_e4m3fn),
        "weight_scale_2": _global(packed),
    }


def in_tiles(scale_NG: Tensor) -> Tensor:
    """Return scales in the order of a matrix unit, N and G filled up with zeros to whole tiles.

    scale_NG  one byte each, [N, G]
    returns   the same dtype, [ceil(N / 128) 128, ceil(G / 4) 4]; tile after tile of 128 x 4, and in
              a tile row i of each of its four quarters of 32 rows beside each other
              (cuBLAS documentation, "1D block scaling factors layout")
    """
    rows, groups = scale_NG.shape
    tall, wide = TILE
    full = pad(scale_NG, (0, -groups % wide, 0, -rows % tall))
    tiles = full.view(len(full) // tall, 4, tall // 4, full.shape[1] // wide, wide)
    return tiles.permute(0, 3, 2, 1, 4).reshape(full.shape)


def _global(packed: Packed) -> Tensor:
    assert packed.wglobal is not None
    return packed.wglobal.reshape(())


def _comfy_record(spec: QuantSpec) -> dict[str, Any]:
    return {"format": "nvfp4"}


def _dequantized(packed: Packed, spec: QuantSpec) -> dict[str, Tensor]:
    scales = packed.wscale, packed.wglobal, spec.weights.element
    codes_NK, step_NG = unpack_weight(packed.qweight, *scales)
    return {"weight": dequantize_weight(codes_NK, step_NG).bfloat16()}


BFLOAT16 = LayerFormat(
    name="bfloat16", reader="any", misfits=plain_misfits, tensors=_dequantized, record=None
)
"""Modulators where a format has nothing for them: 4-bit weights as bfloat16, rounded once."""

PACKED_BY = ("method=rtn_nvfp4", "method=dirotq_nvfp4 method.branch=null")

NVFP4 = LayerFormat(
    name="nvfp4", reader="diffusers (`bfl`), ModelOpt", misfits=_misfits, tensors=_tensors,
    record=None, packed_by=PACKED_BY, modulators=BFLOAT16,
)  # fmt: skip
COMFY_NVFP4 = LayerFormat(
    name="comfy_nvfp4", reader="ComfyUI", misfits=_comfy_misfits, tensors=_comfy_tensors,
    record=_comfy_record, packed_by=PACKED_BY, modulators=AWQ_W4A16,
)  # fmt: skip
