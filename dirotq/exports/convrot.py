"""``convrot_w4a4`` of ComfyUI: regular Hadamard blocks, one scale per output and per token.

The reader rotates activations block by block with the regular Hadamard matrix that is ours too
(kernels/formats/hadamard.py), and rounds each row by its absmax / 7. Weights are stored rotated.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dirotq.exports.awq import AWQ_W4A16
from dirotq.exports.layer_format import (
    LayerFormat,
    activations_in_words,
    branch_in_words,
    transform_in_words,
    weights_in_words,
)
from dirotq.kernels.buffers import Packed
from dirotq.kernels.formats.spec import QuantSpec

COLUMNS = 64
"""What the reader's kernels want the channels to be a multiple of."""
ELEMENTS = ("int4", "int8")
"""Activations that ``linear_dtype`` can name."""


def _misfits(spec: QuantSpec) -> Iterator[str]:
    transform, acts = spec.transform, spec.activations
    if transform.kind != "regular" or transform.block < 4 or transform.smooth:
        yield f"{transform_in_words(spec)} (it has regular Hadamard blocks of 4, 16, 64 or 256)"
    if spec.rank:
        yield f"{branch_in_words(spec)} (it has none)"
    if spec.weights.name != "channel":
        yield f"{weights_in_words(spec)} (it has int4 with one scale per output)"
    if acts.element not in ELEMENTS or acts.name != "token":
        yield f"{activations_in_words(spec)} (it has int4 or int8 with one scale per token)"
    if spec.in_features % COLUMNS:
        yield f"{spec.in_features} channels (it has multiples of {COLUMNS})"


def _tensors(packed: Packed, spec: QuantSpec) -> dict[str, Tensor]:
    return {
        "weight": packed.qweight.view(torch.int8),
        "weight_scale": packed.wscale[:, 0].float(),
    }


def _record(spec: QuantSpec) -> dict[str, Any]:
    element = spec.activations.element
    values = {"format": "convrot_w4a4", "convrot_groupsize": spec.transform.block}
    return values if element == "int4" else values | {"linear_dtype": element}


CONVROT_W4A4 = LayerFormat(
    name="convrot_w4a4", reader="ComfyUI", misfits=_misfits, tensors=_tensors, record=_record,
    packed_by=("method=convrot weight_format=int4_channel act_format=int4_token",),
    modulators=AWQ_W4A16,
)  # fmt: skip
