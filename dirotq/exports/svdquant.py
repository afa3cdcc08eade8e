"""``svdquant_w4a4`` of comfy-kitchen: a low-rank branch beside the input, groups of 64.

y = quant4(x / smooth_factor) · quant4(weight)ᵀ + (x · proj_down) · proj_upᵀ + bias, in the layout
that its documentation calls natural. Our smoothing factors multiply: theirs are their inverses.

Letters: N outputs, K channels, R rank, G groups.
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
    branch_in_words,
    transform_in_words,
    weights_in_words,
)
from dirotq.kernels.buffers import Packed
from dirotq.kernels.formats.spec import QuantSpec

GROUP = 64
RANK_STEP = 16
"""The reader multiplies the branch in tiles of 16: ranks are filled up with zeros."""


def _misfits(spec: QuantSpec) -> Iterator[str]:
    if spec.transform.kind == "dense" or spec.transform.block > 1:
        yield f"{transform_in_words(spec)} (it has no rotation)"
    if spec.rank and (spec.branch.kind != "beside" or spec.branch.bits != 16):
        yield f"{branch_in_words(spec)} (it has a 16-bit branch beside the input)"
    if spec.weights.element != "int4" or spec.weights.group_size != GROUP:
        yield f"{weights_in_words(spec)} (it has int4 with one scale per group of {GROUP})"
    acts = spec.activations
    if acts.element != "int4" or acts.name != "group" or acts.group_size != GROUP:
        yield f"{activations_in_words(spec)} (it has int4 with one scale per group of {GROUP})"


def _tensors(packed: Packed, spec: QuantSpec) -> dict[str, Tensor]:
    down_KR, up_NR, smooth_K = packed.basis, packed.wp, packed.smooth
    missing = max(RANK_STEP, -(-spec.rank // RANK_STEP) * RANK_STEP) - spec.rank
    like = packed.wscale
    down_KR = like.new_zeros(spec.in_features, 0) if down_KR is None else down_KR
    up_NR = like.new_zeros(len(packed.qweight), 0) if up_NR is None else up_NR
    smooth_K = like.new_ones(spec.in_features) if smooth_K is None else smooth_K
    return {
        "weight": packed.qweight.view(torch.int8),
        "weight_scale": packed.wscale.mT.contiguous(),
        "smooth_factor": smooth_K.float().reciprocal().to(smooth_K.dtype),
        "proj_down": pad(down_KR, (0, missing)),
        "proj_up": pad(up_NR, (0, missing)),
    }


def _record(spec: QuantSpec) -> dict[str, Any]:
    return {"format": "svdquant_w4a4"}


SVDQUANT_W4A4 = LayerFormat(
    name="svdquant_w4a4", reader="comfy-kitchen", misfits=_misfits, tensors=_tensors,
    record=_record, modulators=AWQ_W4A16,
    packed_by=("method=absorb", "method=rtn", "method=smoothquant", "method=svdquant"),
)  # fmt: skip
