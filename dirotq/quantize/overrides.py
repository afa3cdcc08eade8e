"""Exceptions to a method: sites that stay in 16 bits, quantize activations finer, or fix a rank."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from dirotq.errors import ConfigError
from dirotq.models.family import Site

CHANGES = ("keep", "act_bits", "rank")
FORM = '{sites: "transformer_blocks.0.*", keep: 16} (or act_bits: 8, or rank: 32)'


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """What the sites that match a pattern do otherwise than their method.

    ``sites``     pattern of site names; ``*`` stands for any characters, dots too
    ``keep``      16: the site is not quantized at all
    ``act_bits``  4, 8 or 16 bits of its activations
    ``rank``      directions it protects, whatever else would decide
    ``why``       the reason, for the plan

    The last two concern block sites only: modulators protect no direction and have 16-bit
    activations anyway.
    """

    sites: str
    keep: int | None = None
    act_bits: int | None = None
    rank: int | None = None
    why: str = ""

    @property
    def told(self) -> str:
        """Reason and change in words."""
        said = {"keep": f"{self.keep} bits", "act_bits": f"{self.act_bits}-bit activations",
                "rank": f"rank {self.rank}"}  # fmt: skip
        made = ", ".join(said[name] for name in CHANGES if getattr(self, name) is not None)
        return f"{self.why or f'override {self.sites}'}: {made}"

    @property
    def decides(self) -> bool:
        """It leaves no rank to choose."""
        return (self.keep, self.rank) != (None, None)

    def matches(self, site: Site) -> bool:
        return fnmatchcase(site.name, self.sites)


def parse_overrides(
    values: Iterable[Mapping[str, Any]],
) -> tuple[Override, ...]:
    """Check the list that conf/method holds.

    Raises ConfigError for an entry with an unknown or missing key, or a value out of range.
    """
    return tuple(_parsed(value, f"method.overrides[{i}]") for i, value in enumerate(values))


def _parsed(value: Mapping[str, Any], setting: str) -> Override:
    known = [field.name for field in fields(Override)]
    if not isinstance(value, Mapping) or not set(value) <= set(known):
        raise ConfigError(
            f"{setting}={value!r} is no override: its keys are {', '.join(known)}; write {FORM}"
        )
    changes = {name: value[name] for name in CHANGES if value.get(name) is not None}
    if not isinstance(value.get("sites"), str) or not changes:
        raise ConfigError(
            f"{setting}={dict(value)!r} needs `sites`, a pattern, and one of "
            f"{', '.join(CHANGES)}; write {FORM}"
        )
    allowed = {"keep": (16,), "act_bits": (4, 8, 16)}
    for name, number in changes.items():
        if name in allowed and number not in allowed[name]:
            raise ConfigError(
                f"{setting}.{name}={number!r}: use {' or '.join(map(str, allowed[name]))}"
            )
    rank = changes.get("rank", 0)
    if type(rank) is not int or rank < 0:
        raise ConfigError(f"{setting}.rank={rank!r}: use 0 or more directions")
    if "keep" in changes and len(changes) > 1:
        raise ConfigError(
            f"{setting}={dict(value)!r}: a site that is kept in 16 bits has no "
            f"{' or '.join(sorted(changes.keys() - {'keep'}))}; leave one of them out"
        )
    return Override(**value)


def override_of(overrides: Iterable[Override], site: Site) -> Override | None:
    """Return what all entries that match ``site`` say together, ``why`` in words for the plan.

    None if none matches. Later ones win, ``keep`` over all.
    """
    found = [override for override in overrides if override.matches(site)]
    if site.kind != "block":
        found = [override for override in found if override.keep is not None]
    if not found:
        return None
    if kept := [override for override in found if override.keep is not None]:
        found = kept[-1:]
    last = {
        name: next((v for o in reversed(found) if (v := getattr(o, name)) is not None), None)
        for name in CHANGES
    }
    return Override(sites=site.name, why=" and ".join(o.told for o in found), **last)


def check_overrides(
    overrides: Sequence[Override],
    sites: Sequence[Site],
    grid: int,
) -> None:
    """Hold overrides against the sites of a model.

    Raises ConfigError for a pattern that matches no site (naming the closest ones), that asks
    modulators for what only blocks have, a rank off the grid, or when nothing is left to quantize.
    """
    for index, override in enumerate(overrides):
        matched = [site for site in sites if override.matches(site)]
        if not matched:
            names = [site.name for site in sites]
            close = difflib.get_close_matches(override.sites, names, n=3, cutoff=0)
            raise ConfigError(
                f"method.overrides[{index}].sites={override.sites!r} matches none of the model's "
                f"{len(names)} sites; the closest are {', '.join(close)}"
            )
        if override.keep is None and all(site.kind != "block" for site in matched):
            raise ConfigError(
                f"method.overrides[{index}].sites={override.sites!r} matches modulators only "
                f"({matched[0].name}, ...), which have 16-bit activations and no rank: use "
                "keep: 16 for them, or match block sites"
            )
        if override.rank is not None and override.rank % grid:
            raise ConfigError(
                f"method.overrides[{index}].rank={override.rank} is not on the grid: use a "
                f"multiple of {grid}"
            )
    blocks = [site for site in sites if site.kind == "block"]
    if blocks and all((o := override_of(overrides, s)) and o.keep for s in blocks):
        raise ConfigError(
            "method.overrides keep every block site in 16 bits: nothing is left to quantize; use "
            "narrower patterns"
        )
