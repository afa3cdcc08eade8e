"""The table of docs/models.md: what is packed of each class, and the proof. ``make classes``."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import diffusers
import torch
from fused_sites import fused

from benchmarks.published import put
from dirotq.models import discovery
from dirotq.models.coverage import in_blocks
from dirotq.models.draft import pattern
from dirotq.models.families import known_family
from dirotq.models.family import is_linear
from dirotq.models.skeleton import empty_transformer
from dirotq.packed.swap import swap_sites

from . import UNTABLED, classes, made
from .proof import BY_TABLE, apart, found, output

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
HEAD = """| class | parameters | sites | packed, % | stays in 16 bits | error |
|---|---|---|---|---|---|
"""
SHORT = {
    discovery.ACROSS: "text",
    discovery.UNCALLED: "not called",
    discovery.UNMIXED: "prepares an input",
    discovery.PARAMETER: "bare parameter",
    discovery.BYPASSED: "read around the call",
    discovery.EXACT: "float32",
    BY_TABLE: "table",
}
SHOWN = 3
"""Names of linears for each reason; the rest is counted."""
LEAST = 0.5
"""Of what conf/rank asks to be packed."""


def line(name: str) -> str:
    """Build, find and prove one class; return its row."""
    network, inputs = made(name)
    seen = found(network, inputs)
    real = whole(name)
    inside = in_blocks(real)
    packed = {pattern(linear) for site in seen.sites for linear in site.linears}
    held = sum(p.numel() for n, p in inside.items() if pattern(n.removesuffix(".weight")) in packed)
    share = held / sum(p.numel() for p in inside.values())
    places = {pattern(site.linears[0]) for site in seen.sites}
    linears = [path for path, module in real.named_modules() if is_linear(module)]
    sites = sum(pattern(path) in places for path in linears)
    want = output(network, inputs)
    with torch.no_grad():
        swap_sites(network, seen.sites, lambda site: fused(network, site))
    error = apart(output(network, inputs), want)
    size = sum(p.numel() for p in real.parameters())
    told = f"{size / 1e9:.1f} B" if size > 5e7 else f"{size / 1e6:.1f} M"
    mark = "" if known_family(name) is None else " (table)"
    refused = "" if share >= LEAST else ", refused"
    return (
        f"| `{name}`{mark} | {told} | {sites} | {100 * share:.1f}{refused} "
        f"| {kept(seen.kept)} | {error:.0e} |"
    )


def whole(name: str) -> Any:
    """Make a class without memory, as large as its own defaults."""
    lacking = UNTABLED[name].lacking if name in UNTABLED else {}
    return empty_transformer(lacking, getattr(diffusers, name))


def kept(reasons: dict[str, str]) -> str:
    """Name what stays inside of the blocks, by reason."""
    names: dict[str, dict[str, None]] = defaultdict(dict)
    for path, why in reasons.items():
        _, _, below = pattern(path).partition("*.")
        if why != discovery.OUTSIDE and below:
            names[SHORT[why]][below.removesuffix(".weight")] = None
    said = []
    for why, paths in names.items():
        some = ", ".join(f"`{path}`" for path in list(paths)[:SHOWN])
        more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
        said.append(f"{some}{more}: {why}")
    return "; ".join(said)


if __name__ == "__main__":
    diffusers.logging.set_verbosity_error()
    put(PAGE, "classes", HEAD + "\n".join(line(name) for name in classes()) + "\n")
