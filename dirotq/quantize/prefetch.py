"""Read the next item from disk while the present one is computed."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(load: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Yield ``(item, load(item))`` in order, loading one item ahead in a thread.

    At most two loaded items are alive: the one yielded and the next.
    """
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            following = (item, pool.submit(load, item))
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()
