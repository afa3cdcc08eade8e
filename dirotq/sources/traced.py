"""Which tensors of a file a foreign converter used: what it leaves out it rarely says."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


class Traced(Tensor):
    """A tensor that knows the names of all tensors it was computed from."""

    sources: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        sources = frozenset().union(*(t.sources for t in _traced([args, kwargs])))
        for tensor in _traced(made):
            tensor.sources |= sources
        return made


def traced(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mark tensors, to be handed to a converter."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found[name] = marked = tensor.as_subclass(Traced)
        marked.sources = frozenset((name,))
    return found


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what came out of it as ordinary tensors."""
    return {name: tensor.as_subclass(Tensor) for name, tensor in tensors.items()}


def left_out(given: Mapping[str, Tensor], made: Mapping[str, Any]) -> list[str]:
    """Name tensors of ``given`` that nothing in ``made`` was computed from."""
    used = frozenset().union(*(tensor.sources for tensor in _traced(list(made.values()))))
    return [name for name in given if name not in used]


def _traced(values: Any) -> Iterator[Traced]:
    if isinstance(values, Traced):
        yield values
    elif isinstance(values, Mapping):
        yield from _traced(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _traced(value)
