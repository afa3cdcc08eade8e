"""Which settings of `dirotq compress` lead to a plan that a format can hold: each is tried."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dirotq.errors import DirotqError
from dirotq.exports.layer_format import LayerFormat
from dirotq.models.family import Site
from dirotq.pipeline.config import compose_config, groups
from dirotq.pipeline.settings import make
from dirotq.quantize.plan import Method

CONF = "dirotq.conf"
RANK = 16
SHOWN = 4


def expressible(wanted: LayerFormat, sites: Sequence[Site]) -> list[str]:
    """Return overrides that pack these sites so that the format holds them, the shortest first.

    Every method of conf/method is tried: as it is, with other number formats, without its branch.
    """
    blocks = [site for site in sites if site.kind == "block"]
    shortest: dict[str, list[str]] = {}
    for words, method in _candidates():
        known = shortest.get(method.name)
        if (known is None or len(words) < len(known)) and _fits(wanted, method, blocks):
            shortest[method.name] = words
    least = min(map(len, shortest.values()), default=0)
    near = sorted((w for w in shortest.values() if len(w) <= least + 1), key=len)
    return [" ".join(words) for words in near[:SHOWN]]


@functools.cache
def _made(part: str) -> Mapping[str, Any]:
    """Return {choice: what it makes} of a group. Composing takes a fifth of a second for each."""
    choices = groups(CONF)[part]
    return {name: make(compose_config([f"{part}={name}"], CONF)[part], part) for name in choices}


def _candidates() -> Iterator[tuple[list[str], Method]]:
    methods, weights, acts = map(_made, ("method", "weight_format", "act_format"))
    for name, method in methods.items():
        for weight, act, branch in itertools.product(
            [None, *weights], [None, *acts], [True, False]
        ):
            words, changed = [f"method={name}"], method
            if weight is not None:
                words.append(f"weight_format={weight}")
                changed = replace(changed, weights=weights[weight])
            if act is not None:
                words.append(f"act_format={act}")
                changed = replace(changed, activations=acts[act])
            if not branch:
                words.append("method.branch=null")
                changed = replace(changed, branch=None)
            yield words, changed


def _fits(wanted: LayerFormat, method: Method, sites: Sequence[Site]) -> bool:
    try:
        specs = [method.spec(site, RANK) for site in sites]
    except DirotqError:
        return False
    return all(spec is None or not any(wanted.misfits(spec)) for spec in specs)
