"""One site, packed in memory by rounding to nearest: for measurements that come before ``gptq``."""

import torch

from dirotq.kernels.formats.quantize_weight import (
    codes_on_grid,
    pack_codes,
    stored_scales,
    tail_floor,
    weight_steps,
)
from dirotq.kernels.linear import QuantLinear
from dirotq.pipeline.artifact import Artifact
from dirotq.quantize.plan import SitePlan
from dirotq.quantize.rotation import site_rotation
from dirotq.sources.weights import Weights


def pack_nearest(
    entry: SitePlan, basis: Artifact, weights: Weights, device: torch.device
) -> QuantLinear:
    """What ``gptq``, ``fuse`` and ``pack`` would make of a site with method.rounding=nearest.

    All columns count alike in the search for a clipped scale: second moments of the main branch
    are not computed here.
    """
    rotation = site_rotation(entry, basis, device)
    weight, bias = weights.stacked(entry.site, device)
    main, protected = rotation.weights(weight)
    stored = {
        "basis": rotation.basis_DR,
        "rotation": rotation.rotation_DK,
        "smooth": rotation.smooth_D,
        "bias": None if bias is None else bias.to(torch.bfloat16),
    }
    floor, element = tail_floor(entry.spec, protected, bias), entry.spec.weight_element
    scale, wglobal = stored_scales(main, entry.spec, clip=entry.clip, floor_N1=floor)
    codes = codes_on_grid(main, weight_steps(scale, wglobal), element)
    stored |= {"wscale": scale, "wglobal": wglobal, "qweight": pack_codes(codes, element)}
    stored |= rotation.stored(protected)
    packed = QuantLinear(entry.spec, bias=entry.site.bias, device=device)
    for name, tensor in stored.items():
        if tensor is not None:
            getattr(packed, name).copy_(tensor)
    return packed
