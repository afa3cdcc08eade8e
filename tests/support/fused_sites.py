"""A site rotated but not quantized: what fuse makes, around a random basis."""

import torch
from tiny_spec import tiny_spec
from torch import nn

from dirotq.kernels.formats.hadamard import hadamard_block
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.models.family import Site
from dirotq.quantize.rotation import Rotation
from dirotq.stages.fuse import FusedLinear


def spec_of(site: Site) -> QuantSpec:
    rank = 8 if site.kind == "block" else 0
    return tiny_spec(
        dim=site.in_features,
        rows=site.out_features,
        rank=rank,
        block=hadamard_block(site.in_features, 64),
    )


def fused(transformer: nn.Module, site: Site) -> FusedLinear:
    """The site, rotated but not quantized, in the precision of the transformer."""
    spec = spec_of(site)
    vectors = torch.linalg.qr(
        torch.randn(site.in_features, site.in_features, dtype=torch.float64)
    ).Q
    linears = [transformer.get_submodule(c) for c in site.linears]
    weight = torch.cat([linear.weight.detach().flatten(1) for linear in linears])
    bias = torch.cat([linear.bias.detach() for linear in linears]) if site.bias else None
    return FusedLinear(Rotation.cut({"vectors": vectors}, spec), weight, bias)
