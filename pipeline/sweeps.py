"""What a multirun will run, as far as it can be told before: each value of each sweep once."""

import os
from collections.abc import Iterator, Sequence

from dirotq.pipeline.quoting import parsed, quoted

__all__ = ["variants"]


def variants(overrides: Sequence[str], *, sweep: bool) -> Iterator[list[str]]:
    """Overrides without sweeps: the first values together, then every other one in its place.

    Wrong values show without the whole product. What can't be parsed or counted stays as it is.
    """
    if not sweep:
        yield list(overrides)
        return
    choices = [_values(word) for word in overrides]
    first = [values[0] for values in choices]
    yield first
    for place, values in enumerate(choices):
        for value in values[1:]:
            yield [*first[:place], value, *first[place + 1 :]]


def _values(override: str) -> list[str]:
    if override.startswith("model="):  # names or one path, which pipeline/config.py tells apart
        names = override.partition("=")[2]
        whole = "," not in names or os.path.lexists(names)
        return [override] if whole else [f"model={name}" for name in names.split(",")]
    (word,) = quoted([override], sweep=True)
    found = parsed(word)
    if found is None or not found.is_sweep_override() or not found.is_discrete_sweep():
        return [word]
    name = found.get_key_element()
    return [f"{name}={value}" for value in found.sweep_string_iterator()] or [word]
