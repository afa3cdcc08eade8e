"""One site, packed in memory by rounding to nearest: for measurements that come before ``gptq``."""

import torch

from dirotq.kernels.linear import QuantLinear
from dirotq.kernels.pack_int4 import pack_int4
from dirotq.kernels.quantize_weight import codes_on_grid, scale_floor, weight_scales
from dirotq.models.weights import Weights
from dirotq.pipeline.artifact import Artifact
from dirotq.plan import SitePlan
from dirotq.rotation import site_rotation


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
        "wp": None if protected is None else protected.to(torch.bfloat16),
        "bias": None if bias is None else bias.to(torch.bfloat16),
    }
    per_channel = entry.spec.weight_scale == "channel"
    floor = scale_floor(stored["wp"], stored["bias"]) if per_channel else None
    groups = entry.spec.width // entry.spec.weight_group_size
    scale = weight_scales(main, groups, clip=entry.clip, floor_N1=floor)
    stored |= {"wscale": scale, "qweight": pack_int4(codes_on_grid(main, scale))}
    packed = QuantLinear(entry.spec, bias=entry.site.bias, device=device)
    for name, tensor in stored.items():
        if tensor is not None:
            getattr(packed, name).copy_(tensor)
    return packed
