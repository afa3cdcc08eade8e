"""Tiny transformers in 16 bits and packed by rounding to nearest: what takes `dirotq compress` a
minute, in no time.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from tiny_line import build_transformer
from tiny_spec import tiny_spec

from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.linear import QuantLinear
from dirotq.models.families import family_of
from dirotq.models.family import Site
from dirotq.packed.swap import swap_sites
from dirotq.quantize.nearest import nearest
from dirotq.quantizer import DirotqConfig, mark_packed


@functools.cache
def flux_transformers(root: Path, **blocks: int) -> tuple[Path, Path]:
    """Folders of FLUX's with so many blocks below ``root``: in 16 bits, and packed."""
    name = "-".join(map(str, blocks.values())) or "default"
    return save(root / f"flux-{name}", build_transformer(**blocks))


def save(folder: Path, network: Any) -> tuple[Path, Path]:
    """Write a transformer in 16 bits, and packed."""
    plain, packed = folder / "plain", folder / "packed"
    network.to(torch.bfloat16).save_pretrained(plain)
    pack(network).save_pretrained(packed)
    return plain, packed


def pack(network: Any) -> Any:
    """Round every site to 4 bits, nothing protected, in place."""
    sites = family_of(type(network).__name__).sites(network)
    entries = [(site, spec(site)) for site in sites]
    linears = dict(network.named_modules())
    swap_sites(network, sites, lambda site: _rounded(linears, site))
    mark_packed(network, DirotqConfig.of(entries))
    return network


def spec(site: Site) -> QuantSpec:
    """W4A4 with one scale per row; modulators W4A16, as the default method has them."""
    bits = {"act_bits": 16, "weight_scale": "group"} if site.kind == "modulator" else {}
    return tiny_spec(dim=site.in_features, rows=site.out_features, **bits)


def _rounded(linears: dict[str, Any], site: Site) -> QuantLinear:
    weight = torch.cat([linears[name].weight.float().flatten(1) for name in site.linears])
    bias = torch.cat([linears[name].bias for name in site.linears]) if site.bias else None
    made = QuantLinear(spec(site), bias=site.bias)
    found = nearest(weight, made.spec, clip=False, wp_NR=None, bias_N=bias).stored(made.spec)
    for buffer, tensor in (found if bias is None else found | {"bias": bias}).items():
        getattr(made, buffer).copy_(tensor)
    return made
