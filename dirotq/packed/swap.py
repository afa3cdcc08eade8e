"""Put a wide module in the place of a site's linears, and tell what a transformer weighs."""

import copy
from collections.abc import Callable, Iterable

from torch import nn

from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.linear import PointwiseView, QuantLinear, SharedRead, SiteView
from dirotq.models.family import Site


def swap_sites(
    transformer: nn.Module, sites: Iterable[Site], build: Callable[[Site], nn.Module]
) -> None:
    """Replace each site's linears by ``build(site)``, in place.

    The wide module stands at the site's path; where several linears share it, each of them becomes
    a :class:`SiteView` of its rows. A 1x1 convolution becomes a :class:`PointwiseView` of either.
    ``build`` returns a module that is called as ``wide(x)``, and for some of its outputs as
    ``wide(x, rows=slice)``. The views of a site compute it once where they read one tensor.
    """
    for site in sites:
        wide = build(site)
        _put(transformer, site.name, wide)
        shared = SharedRead(wide, len(site.linears))
        for linear, rows in site.slices():
            part = wide if len(site.linears) == 1 else SiteView(wide, rows, shared)
            if linear != site.name:
                _put(transformer, linear, PointwiseView(part) if site.pointwise else part)


def put_packed(transformer: nn.Module, entries: Iterable[tuple[Site, QuantSpec]]) -> None:
    """Swap every listed site for an empty packed linear (on the meta device), in place."""
    specs = dict(entries)
    swap_sites(
        transformer, specs, lambda site: QuantLinear(specs[site], bias=site.bias, device="meta")
    )


def footprint(transformer: nn.Module) -> dict[str, int]:
    """Count the bytes of a packed transformer by category, from shapes alone (meta device).

    ``codes`` 4-bit weights, ``scales``, ``basis`` P (and dense rotations), ``protected`` W P,
    ``bias`` of packed linears, and ``kept``: every other parameter at its stored 16 bits.
    """
    parts = {
        "qweight": "codes", "wscale": "scales", "wglobal": "scales",
        "basis": "basis", "rotation": "basis", "smooth": "basis",
        "wp": "protected", "wpscale": "protected", "bias": "bias",
    }  # fmt: skip
    total = dict.fromkeys(("codes", "scales", "basis", "protected", "bias", "kept"), 0)
    packed = set()
    for name, module in transformer.named_modules():
        if isinstance(module, QuantLinear):
            for part, tensor in module.named_parameters():
                total[parts[part]] += tensor.numel() * tensor.element_size()
                packed.add(f"{name}.{part}")
    for name, tensor in transformer.state_dict().items():
        if name not in packed:
            total["kept"] += 2 * tensor.numel()
    return total


def packed_bits(site: Site, spec: QuantSpec) -> int:
    """Count the bits of one site's packed linear."""
    packed = QuantLinear(spec, bias=site.bias, device="meta")
    return 8 * sum(t.numel() * t.element_size() for t in packed.parameters())


def effective_bits(skeleton: nn.Module, entries: Iterable[tuple[Site, QuantSpec]]) -> float:
    """Return bits per original parameter of a transformer packed by this plan, all counted.

    skeleton  the 16-bit transformer, on the meta device: shapes are enough
    """
    packed = copy.deepcopy(skeleton)
    put_packed(packed, entries)
    parameters = sum(p.numel() for p in skeleton.parameters())
    return 8 * sum(footprint(packed).values()) / parameters


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    root.get_submodule(parent).add_module(leaf, module)
