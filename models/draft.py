"""A family table drafted from sites: what a person starts from who describes a new architecture."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .family import Kind, ModelFamily, Site, SiteRule

HEAD = '''"""{transformer}: say in a line what its blocks are."""

from .family import ModelFamily, SiteRule

'''


@dataclass(frozen=True, slots=True)
class Shape:
    """What makes two sites of different blocks the same rule, but for linears that one lacks."""

    block: str
    name: str
    kind: Kind
    text: bool


def draft(
    transformer: str,
    sites: Sequence[Site],
    kept: Iterable[str],
    call: Mapping[str, Any],
    mask: str | None = None,
) -> ModelFamily:
    """Return the table whose sites are those of ``sites``, name by name.

    transformer  name of its class
    kept         paths of the linears that no site holds
    call, mask   as :class:`ModelFamily` has them
    """
    kept = list(kept)
    packed = [linear for site in sites for linear in site.linears]
    rules: list[SiteRule] = []
    for shape, linears, blocks in _shapes(sites):
        taken = {f"{block}.{path}".lstrip(".") for block in blocks for path in linears}
        everywhere = [_exact(shape.block, path) for path in linears]
        # Where a block keeps what another one packs, a pattern would claim both.
        alike = not any(re.fullmatch(p, k) for p in everywhere for k in kept if k not in taken)
        for parent in [shape.block] if alike else blocks:
            rules.append(SiteRule(parent, linears, shape.name, shape.kind, shape.text))
    groups = dict.fromkeys(pattern(name) for name in kept)
    exact = [p for p in groups if any(re.fullmatch(_exact("", p), n) for n in packed)]
    keep = [*(p for p in groups if p not in exact), *(n for n in kept if pattern(n) in exact)]
    return ModelFamily(family_name(transformer), transformer, tuple(rules), tuple(keep), call, mask)


def source(family: ModelFamily) -> str:
    """Return the table as the Python of a file models/<family>.py."""
    lines = [HEAD.format(transformer=family.transformer) + f"{family.name.upper()} = ModelFamily("]
    lines += [f'    name="{family.name}",', f'    transformer="{family.transformer}",']
    lines.append("    rules=(")
    lines += [f"        {_rule(rule)}," for rule in family.rules]
    lines += ["    ),", "    keep=("]
    lines += [f"        {_text(name)}," for name in family.keep]
    lines += ["    ),", "    call={"]
    lines += [f"        {_text(name)}: {value!r}," for name, value in family.call.items()]
    lines.append("    },")
    if family.mask:
        lines.append(f"    mask={_text(family.mask)},")
    return "\n".join([*lines, ")", ""])


def family_name(transformer: str) -> str:
    """Return the name of a class's family: CogView4Transformer2DModel is ``cogview4``."""
    plain = re.sub(r"Transformer(2D|3D)?(Model)?$|Model$", "", transformer) or transformer
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", plain).lower()


def pattern(path: str) -> str:
    """Return a path with ``*`` for the number of its block."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path, count=1)


def _shapes(sites: Sequence[Site]) -> Iterator[tuple[Shape, tuple[str, ...], list[str]]]:
    """Yield shapes of sites, with all linears that one has, and the blocks where it is."""
    found: dict[Shape, list[tuple[tuple[str, ...], str]]] = defaultdict(list)
    for site in sites:
        below = len(site.block) + 1 if site.block else 0
        linears = tuple(linear[below:] for linear in site.linears)
        alone = len(linears) == 1 and not site.pointwise  # it is named after its linear
        name = "" if alone else site.name[below:]
        shape = Shape(pattern(site.block), name, site.kind, site.text)
        found[shape].append((linears, site.block))
    whole = [
        (shape, linears, [block for some, block in members if some == linears])
        for shape, members in found.items()
        for linears in dict.fromkeys(some for some, _ in members)
    ]
    for shape, linears, blocks in whole:
        alike = [
            (set(some), there)
            for other, some, there in whole
            if (other.block, other.kind) == (shape.block, shape.kind)
        ]
        if any(set(linears) < some for some, _ in alike):
            continue  # the rule of the block that has more holds here too
        smaller = [block for some, there in alike if some < set(linears) for block in there]
        yield shape, linears, [*blocks, *smaller]


def _exact(block: str, path: str) -> str:
    """Return a regular expression of the paths that a rule's pattern matches."""
    joined = f"{block}.{path}" if block else path
    return re.escape(joined).replace(r"\*", r"[^.]+")


def _rule(rule: SiteRule) -> str:
    said = [_text(rule.parent), f"({', '.join(map(_text, rule.linears))},)"]
    if len(rule.linears) > 1:
        said[1] = said[1].replace(",)", ")")
    if rule.name:
        said.append(_text(rule.name))
    if rule.kind != "block":
        said.append(f"kind={_text(rule.kind)}")
    if rule.text:
        said.append("text=True")
    line = f"SiteRule({', '.join(said)})"
    if len(line) + 9 <= 100:
        return line
    return "\n            ".join(["SiteRule(", *(f"{part}," for part in said)]) + "\n        )"


def _text(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
