"""``awq_w4a16``: how ComfyUI's formats hold modulators, which see one row per image.

Weights are unsigned 4-bit codes: (code - 8) * scale + zero. Ours are symmetric, zero is 0.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dirotq.exports.layer_format import LayerFormat, plain_misfits, weights_in_words
from dirotq.kernels.buffers import Packed
from dirotq.kernels.formats.spec import QuantSpec

GROUP = 64
"""Columns of a group in the files that others write; ours are divided down to it."""
OFFSET = 0x88
"""Both nibbles' sign bits: two's complement with the sign flipped counts from -8 on."""


def _misfits(spec: QuantSpec) -> Iterator[str]:
    if spec.weights.name != "group":
        yield f"{weights_in_words(spec)} (it has int4 with one scale per group)"
    yield from plain_misfits(spec)


def _tensors(packed: Packed, spec: QuantSpec) -> dict[str, Tensor]:
    times = spec.weight_group_size // _group(spec)
    scale_GN = packed.wscale.repeat_interleave(times, 1).mT.contiguous()
    return {
        "weight": (packed.qweight ^ OFFSET).view(torch.int8),
        "weight_scale": scale_GN,
        "weight_zeros": torch.zeros_like(scale_GN),
    }


def _record(spec: QuantSpec) -> dict[str, Any]:
    return {"format": "awq_w4a16", "group_size": _group(spec)}


def _group(spec: QuantSpec) -> int:
    return GROUP if spec.weight_group_size % GROUP == 0 else spec.weight_group_size


AWQ_W4A16 = LayerFormat(
    name="awq_w4a16", reader="ComfyUI", misfits=_misfits, tensors=_tensors, record=_record
)
