"""What two recipes differ in, leaf by leaf."""

from collections.abc import Iterator, Mapping
from typing import Any

_SHORT = {"stage": "recipe", "inputs": "input"}  # what people read for the two halves of a recipe


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return {dotted name: (old, new)} of every leaf in which two recipes differ."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    names = [*before, *(name for name in after if name not in before)]
    pairs = {name: (before.get(name, "(absent)"), after.get(name, "(absent)")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested recipes; a stage's own fields are called recipe.<field>."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            path = f"{name}.{key}" if name else _SHORT.get(str(key), str(key))
            yield from _leaves(inner, path)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{name}[{index}]")
    else:
        yield name, str(value)
