"""``dirotq sites``: what of a model would be packed, and a draft of its family table."""

import argparse
import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dirotq.errors import UnsupportedError
from dirotq.pipeline.config import compose_config
from dirotq.pipeline.disk import printable
from dirotq.pipeline.settings import make
from dirotq.progress import begin

if TYPE_CHECKING:
    from dirotq.models.family import Site

TABLED = "by the table models/{name}.py"


def add_sites(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb `sites`."""
    parser = add(
        _sites, "which linears of a model are packed, by the input that they share",
        "tiny_flux", "FOLDER", "FOLDER --table > models/new_family.py",
    )  # fmt: skip
    parser.add_argument(
        "model", metavar="MODEL", help="a name of conf/model, a diffusers folder, or a hub id"
    )
    parser.add_argument(
        "--table", action="store_true", help="print only a draft of the family table, in Python"
    )


def _sites(options: argparse.Namespace) -> int:
    """List the sites of a model: linears that read one input and are packed as one.

    `*` stands for the numbers of blocks. A model without a table is traced: one forward without
    weights shows which linears read the same. --table drafts the table that CONTRIBUTING.md asks
    for; what a trace can't tell is marked in it.
    """
    begin("reading the model")
    name = options.model.removeprefix("model=")
    model = make(compose_config([f"model={name}"], options.config).model, "model")
    if not hasattr(model, "sites"):
        raise UnsupportedError(f"{name} is no diffusers pipeline")
    sites, kept = sites_and_rest(model)
    if options.table:  # of the first of several denoisers, which are of one class
        print(table(model, *_of_one(sites, kept)))
        return 0
    for line in told(sites, kept):
        print(printable(line))
    return 0


def sites_and_rest(model: Any) -> "tuple[list[Site], dict[str, str]]":
    """Return the sites of a DiffusersModel, and {linear: why it stays in 16 bits}."""
    # With torch, which takes seconds: not before the options are right.
    from dirotq.models.family import is_linear

    if not model.family.rules:
        found = model.discovered()
        return found.sites, found.kept
    sites = model.sites()
    packed = {linear for site in sites for linear in site.linears}
    linears = [name for name, module in model.shapes().named_modules() if is_linear(module)]
    why = TABLED.format(name=model.family.name)
    return sites, {name: why for name in linears if name not in packed}


def _of_one(sites: "list[Site]", kept: Mapping[str, str]) -> "tuple[list[Site], dict[str, str]]":
    from dirotq.models.denoisers import MAIN, alone, prefix

    before = prefix(MAIN)
    if not all(site.name.startswith(before) for site in sites[:1]):
        return sites, dict(kept)
    mine = [alone(site, MAIN) for site in sites if site.name.startswith(before)]
    return mine, {n.removeprefix(before): w for n, w in kept.items() if n.startswith(before)}


def told(sites: "Iterable[Site]", kept: Mapping[str, str]) -> list[str]:
    """Return the lines of the list: each kind of site, then what stays in 16 bits and why."""
    from dirotq.models.draft import pattern

    sites = list(sites)
    rows: Counter[tuple[str, ...]] = Counter()
    for site in sites:
        parent = _parent(site.linears)
        linears = [linear.removeprefix(parent) for linear in site.linears]
        shape = f"{site.in_features} -> {' + '.join(map(str, site.out_features))}"
        traits = (("bias", site.bias), ("1x1", site.pointwise), ("text", site.text))
        kind = " ".join([site.kind, *(name for name, is_so in traits if is_so)])
        rows[pattern(site.name), shape, kind, pattern(parent) + ", ".join(linears)] += 1
    lines = [f"{sum(len(s.linears) for s in sites)} linears in {len(sites)} sites are packed:"]
    for (name, shape, kind, readers), count in rows.items():
        lines.append(f"  {count:>3} x {name}  {shape}  ({kind})")
        if readers != name:
            lines.append(f"        = {readers}")
    lines.append(f"{len(kept)} linears stay in 16 bits:")
    for (name, why), count in Counter((pattern(n), why) for n, why in kept.items()).items():
        lines.append(f"  {count:>3} x {name}  ({why})")
    return lines


def table(model: Any, sites: "list[Site]", kept: Iterable[str]) -> str:
    """Return a draft of models/<family>.py; what sites can't tell stands in comments at its end."""
    import inspect

    from dirotq.models.draft import draft, source

    family = model.family
    made = draft(family.transformer, sites, kept, model.call_arguments(), family.mask)
    if family.rules:
        return source(made)
    with contextlib.suppress(AttributeError):
        import diffusers

        forward = getattr(diffusers, family.transformer).forward
        masks = [name for name in inspect.signature(forward).parameters if "mask" in name]
    asked = f" or mask={masks[0]!r}" if masks else ""
    return source(made) + (
        "# Drafted from one traced forward. To be decided by somebody who knows the model:\n"
        "# - text=True of rules whose linears read text tokens; mask= is the argument of forward\n"
        f"#   that masks these tokens{asked}\n"
        "# - call: the defaults of its model card\n"
        "# - names of sites: any that the block does not use (`attn.qkv`)\n"
    )


def _parent(linears: Iterable[str]) -> str:
    """Return the path, with its last dot, that all linears lie under."""
    parts = [linear.split(".")[:-1] for linear in linears]
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return "".join(f"{part}." for part in common)
