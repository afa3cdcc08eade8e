"""Which rows of a packed folder make a native layer, and which of its tensors stay as they are."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dirotq.errors import UnsupportedError
from dirotq.exports.native_names import WHOLE, Rename, native_names
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.models.family import Site
from dirotq.packed.config import Entry


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """A native linear in 4 bits: ``rows`` of a site's outputs."""

    native: str
    site: Site
    spec: QuantSpec
    rows: slice


@dataclass(frozen=True, slots=True)
class KeptTensor:
    """A native tensor in 16 bits: diffusers' tensors one below the other, or halves swapped."""

    native: str
    stored: tuple[str, ...]
    swapped: bool


def native_layers(
    transformer_class: str, entries: Sequence[Entry], kept: Iterable[str]
) -> tuple[list[PackedLayer], list[KeptTensor]]:
    """Return the layers of the native file, the packed ones site by site.

    kept  names of the tensors outside of packed linears

    Raises UnsupportedError for a class or a module without a native name, or a native layer that is
    partly packed, or of several sites.
    """
    places = {
        linear: (site, spec, rows) for site, spec in entries for linear, rows in site.slices()
    }
    leaves: dict[str, list[str]] = {}
    for name in kept:
        module, _, leaf = name.rpartition(".")
        leaves.setdefault(module, []).append(leaf)
    packed, rest = [], []
    whole = transformer_class in WHOLE
    for native, modules, rule in _renamed(
        native_names(transformer_class), [*places, *leaves], whole=whole
    ):
        inside = [places[module] for module in modules if module in places]
        if inside:
            packed.append(_layer(native, modules, inside))
            continue
        for leaf in leaves[modules[0]]:
            called = "scale" if rule is not None and rule.scale and leaf == "weight" else leaf
            stored = tuple(_join(module, leaf) for module in modules)
            swapped = rule is not None and rule.swapped
            rest.append(KeptTensor(_join(native, called), stored, swapped))
    order = {site.name: index for index, (site, _) in enumerate(entries)}
    return sorted(packed, key=lambda layer: order[layer.site.name]), rest


def _renamed(
    rules: Sequence[Rename], present: Sequence[str], *, whole: bool
) -> Iterator[tuple[str, tuple[str, ...], Rename | None]]:
    """Yield native name, its diffusers modules, and the rule; each present module comes once."""
    there = dict.fromkeys(present)
    taken: set[str] = set()
    for rule in rules:
        first = re.escape(rule.modules[0]).replace(r"\*", r"([^.]+)")
        for module in there:
            if (found := re.fullmatch(first, module)) is None:
                continue
            modules = tuple(_filled(path, found.groups()) for path in rule.modules)
            if lost := [path for path in modules if path not in there]:
                raise UnsupportedError(
                    f"{_filled(rule.native, found.groups())} joins {', '.join(modules)}, and this "
                    f"transformer has no {', '.join(lost)}: it can't be exported"
                )
            taken.update(modules)
            yield _filled(rule.native, found.groups()), modules, rule
    if (others := [module for module in there if module not in taken]) and whole:
        raise UnsupportedError(
            f"{others[0]} (of {len(others)} such modules) has no native name: this variant of the "
            "architecture can't be exported"
        )
    yield from ((module, (module,), None) for module in others)


def _layer(
    native: str, modules: Sequence[str], inside: Sequence[tuple[Site, QuantSpec, slice]]
) -> PackedLayer:
    sites = {site.name for site, _, _ in inside}
    rows = [rows for _, _, rows in inside]
    lie_together = all(a.stop == b.start for a, b in itertools.pairwise(rows))
    if len(inside) < len(modules) or len(sites) > 1 or not lie_together:
        raise UnsupportedError(
            f"{native} is one linear in native files, and here {', '.join(modules)} are not one "
            "site in 4 bits: pack them together, without method.overrides that name some of them"
        )
    site, spec, _ = inside[0]
    return PackedLayer(native, site, spec, slice(rows[0].start, rows[-1].stop))


def _filled(path: str, parts: Sequence[str | None]) -> str:
    for part in parts:
        path = path.replace("*", str(part), 1)
    return path


def _join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf
