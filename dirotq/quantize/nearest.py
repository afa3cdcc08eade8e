"""Rounding to nearest: what GPTQ begins with, and a whole site for measurements before it.

Letters: N outputs, K main-branch inputs, G groups per row, R protected directions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dirotq.kernels.formats.quantize_weight import (
    appended_floor,
    codes_on_grid,
    dequantize_weight,
    pack_codes,
    stored_scales,
    weight_steps,
)
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.linear import QuantLinear
from dirotq.pipeline.artifact import Artifact
from dirotq.quantize.plan import SitePlan
from dirotq.quantize.rotation import site_rotation
from dirotq.sources.weights import Weights


class Rounded(NamedTuple):
    """A weight as codes on the grid of its packed linear."""

    codes: Tensor
    """int8 [N, K]."""
    step: Tensor
    """Value of a code of 1, [N, G]."""
    wscale: Tensor
    """bfloat16 or uint8 [N, G]."""
    wglobal: Tensor | None
    """Of NVFP4 only, float32 [1]."""
    floor: Tensor | None
    """Least scale of each row for its FP8 tail, bfloat16 [N, 1]."""

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return codes times steps, [N, K]."""
        return dequantize_weight(self.codes, self.step, dtype)

    def stored(self, spec: QuantSpec) -> dict[str, Tensor]:
        """Return the buffers of a packed linear that hold them."""
        found = {"qweight": pack_codes(self.codes, spec.weights.element), "wscale": self.wscale}
        return found if self.wglobal is None else found | {"wglobal": self.wglobal}


def nearest(
    w_NK: Tensor,
    spec: QuantSpec,
    *,
    clip: bool,
    wp_NR: Tensor | None,
    bias_N: Tensor | None,
    importance_K: Tensor | None = None,
) -> Rounded:
    """Choose the grid of a weight in its rotated coordinates, and the nearest codes on it.

    w_NK          float32, [N, K]
    clip          search for clipped scales
    wp_NR         float32, [N, R], the protected columns, or None at rank 0
    bias_N        float32, [N], or None
    importance_K  float >= 0, [K]: weight of a column's squared error in that search; None counts
                  all columns alike
    """
    floor = appended_floor(spec, wp_NR, bias_N)
    stored = stored_scales(w_NK, spec, clip=clip, importance_K=importance_K, floor_N1=floor)
    element = spec.weights.element
    step = weight_steps(*stored, element)
    return Rounded(codes_on_grid(w_NK, step, element), step, *stored, floor)


def pack_nearest(
    entry: SitePlan, basis: Artifact, weights: Weights, device: torch.device
) -> QuantLinear:
    """Make what ``gptq``, ``fuse`` and ``pack`` would of a site with method.rounding=nearest.

    All columns count alike in the search for a clipped scale: second moments of the main branch
    are not computed here.
    """
    [packed] = pack_each([entry], basis, weights, device)
    return packed


def pack_each(
    entries: Sequence[SitePlan], basis: Artifact, weights: Weights, device: torch.device
) -> list[QuantLinear]:
    """Do so by each of several plans of one site, and round once where activations alone differ."""
    made, stored = [], dict[str, dict[str, Tensor]]()
    for entry in entries:
        rest = {k: v for k, v in entry.spec.recorded().items() if not k.startswith("act_")}
        rounded_as = str((rest, entry.spec.width, entry.clip))
        if rounded_as not in stored:
            stored[rounded_as] = _stored(entry, basis, weights, device)
        packed = QuantLinear(entry.spec, bias=entry.site.bias, device=device)
        for name, tensor in stored[rounded_as].items():
            getattr(packed, name).copy_(tensor)
        made.append(packed)
    return made


def _stored(
    entry: SitePlan, basis: Artifact, weights: Weights, device: torch.device
) -> dict[str, Tensor]:
    rotation = site_rotation(entry, basis, device)
    weight, bias = weights.stacked(entry.site, device)
    main, protected = rotation.weights(weight)
    rounded = nearest(main, entry.spec, clip=entry.clip, wp_NR=protected, bias_N=bias)
    return rotation.stored(protected, bias) | rounded.stored(entry.spec)
