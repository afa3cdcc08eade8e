"""Sites whose 4-bit activations cost the most, and what they get instead (docs/method.md M6)."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dirotq.errors import ConfigError
from dirotq.quantize.plan import Method
from dirotq.quantize.workload import Workload

LEAST_GAIN = 0.05
"""dB of all sites' summed error that finer activations of one site must take away."""
MOST_WORK = 0.1
"""Share of a forward's multiply-adds that ``auto`` gives 8-bit activations."""
FORM = "write auto, {count: 3, act_bits: 8} or {count: 3, keep: 16}, or null for none"

Measure = Callable[[Sequence[Method], Collection[str]], Sequence[Mapping[str, float]]]
"""Measures what each named site alone adds to the network's error, quantized by each method."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitive:
    """The ``count`` sites with the largest measured error stay in 16 bits (``keep``), or quantize
    their activations in ``act_bits``. ``count`` None: as many as gain enough (:func:`worthwhile`).
    """

    count: int | None = None
    keep: int | None = None
    act_bits: int | None = None

    def overrides(
        self, method: Method, names: Collection[str], measure: Measure, work: Workload
    ) -> list[dict[str, Any]]:
        """Return entries for ``method.overrides``, of sites among ``names``."""
        if self.count is not None:
            [errors] = measure([method], names)
            return self.worst(errors)
        errors, finer = measure([method, refined(method)], names)
        shares = {site.name: work.share(site) for site in work.block_sites}
        return worthwhile(errors, finer, shares)

    def worst(self, errors: Mapping[str, float]) -> list[dict[str, Any]]:
        """Return entries for the ``count`` sites of the largest errors, {site: any unit}."""
        total = sum(errors.values()) or 1.0
        ranked = sorted(errors, key=lambda name: -errors[name])[: self.count]
        change = {"keep": self.keep} if self.keep else {"act_bits": self.act_bits}
        return [
            {
                "sites": name,
                **change,
                "why": f"number {place} in measured error ({errors[name] / total:.1%} of the sum)",
            }
            for place, name in enumerate(ranked, 1)
        ]


def worthwhile(
    errors: Mapping[str, float], finer: Mapping[str, float], shares: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return entries for ``method.overrides``: sites whose finer activations are worth it.

    errors  of every site, {site: any unit}; they add up to the network's error as far as sites
            disturb it independently
    finer   the same with 8-bit activations
    shares  of the forward's multiply-adds

    Takes the largest gain per share first, as long as it is LEAST_GAIN of what is left of the sum.
    A site that would exceed MOST_WORK is passed over. Small sites may so keep out one that gains
    more than all of them: then the largest gain is taken first.
    """
    gains = {name: errors[name] - finer[name] for name in finer}

    def taken(names: Iterable[str]) -> tuple[float, list[dict[str, Any]]]:
        total = left = sum(errors.values())
        room, entries = MOST_WORK, []
        for name in names:
            decibels = gain_db(left, gains[name])
            if decibels < LEAST_GAIN or shares[name] > room:
                continue
            left, room = left - gains[name], room - shares[name]
            why = f"gains {decibels:.2f} dB for {shares[name]:.1%} of the arithmetic"
            entries.append({"sites": name, "act_bits": 8, "why": why})
        return total - left, entries

    by_share = sorted(gains, key=lambda name: -gains[name] / shares[name])
    by_gain = sorted(gains, key=lambda name: -gains[name])
    return max(taken(by_share), taken(by_gain), key=lambda found: found[0])[1]


def gain_db(total: float, gain: float) -> float:
    """Return by how many dB an error falls that loses ``gain``."""
    if not gain > 0:
        return 0.0
    return math.inf if gain >= total else -10 * math.log10(1 - gain / total)


def refined(method: Method) -> Method:
    """Return the method with 8-bit activations at all block sites."""
    return replace(method, overrides=[*method.overrides, {"sites": "*", "act_bits": 8}])


def check_sensitive(value: Any, method: Method, sites: Sequence[Any]) -> None:
    """Try ``rank.sensitive`` on every block site's formats, before anything is measured.

    Raises ConfigError for a format that can't have its precision, or if no site would be left.
    """
    asked = parse_sensitive(value, method.activations.bits)
    if asked is None:
        return
    blocks = [site.name for site in sites if site.kind == "block"]
    if asked.keep and asked.count is not None and asked.count >= len(blocks):
        raise ConfigError(
            f"rank.sensitive.count={asked.count} keeps all {len(blocks)} block sites in 16 bits: "
            "use less"
        )
    everywhere = replace(asked, count=len(blocks)).worst(dict.fromkeys(blocks, 1.0))
    tried = replace(method, overrides=[*method.overrides, *everywhere])
    for site in sites:
        tried.spec(site, 0)


def parse_sensitive(value: Any, act_bits: int) -> Sensitive | None:
    """``rank.sensitive``, checked against the method's own ``act_bits``.

    None where nothing is to be measured: also for ``auto`` where 8 bits are no finer.

    Raises ConfigError for anything but null, auto, {count: k, keep: 16} or {count: k, act_bits: 8}.
    """
    if value is None:
        return None
    if value == "auto":
        return Sensitive(act_bits=8) if act_bits < 8 else None
    if not isinstance(value, Mapping) or not set(value) <= {"count", "keep", "act_bits"}:
        raise ConfigError(f"rank.sensitive={value!r}: {FORM}")
    count, keep, finer = (value.get(name) for name in ("count", "keep", "act_bits"))
    if type(count) is not int or count < 1:
        raise ConfigError(f"rank.sensitive.count={count!r}: use at least 1 site; {FORM}")
    if (keep is None) == (finer is None) or keep not in (None, 16) or finer not in (None, 8, 16):
        raise ConfigError(f"rank.sensitive={dict(value)!r} says no finer precision: {FORM}")
    if finer is not None and finer <= act_bits:
        raise ConfigError(
            f"rank.sensitive.act_bits={finer} is no finer than the method's {act_bits}-bit "
            "activations (act_format): use more bits or keep: 16"
        )
    return Sensitive(count=count, keep=keep, act_bits=finer)
