"""Settings of `dirotq compress` whose plans an export's format holds, found by trying all."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dirotq.exports.layer_format import LayerFormat
from dirotq.exports.methods import CONF, holds
from dirotq.models.family import Site
from dirotq.pipeline.config import compose_config, groups
from dirotq.pipeline.settings import make
from dirotq.quantize.plan import Method


def shortest(wanted: LayerFormat, sites: Sequence[Site]) -> list[str]:
    """Return what packs these sites so that the format holds them: per method the shortest words,
    if there is none of two words less. The shortest come first."""
    found: dict[str, list[str]] = {}
    for words, method in _candidates():
        known = found.get(method.name)
        if (known is None or len(words) < len(known)) and holds(wanted, method, sites):
            found[method.name] = words
    least = min(map(len, found.values()), default=0)
    return [" ".join(w) for w in sorted(found.values(), key=len) if len(w) <= least + 1]


@functools.cache
def _made(part: str) -> Mapping[str, Any]:
    """Return {choice: what it makes} of a group."""
    choices = groups(CONF)[part]
    return {name: make(compose_config([f"{part}={name}"], CONF)[part], part) for name in choices}


def _candidates() -> Iterator[tuple[list[str], Method]]:
    """Yield every method, as it is, with other number formats, and without its branch."""
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
