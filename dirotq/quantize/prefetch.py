"""Go through sites: skip finished ones, read ahead, hash behind."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from dirotq.models.family import Site
from dirotq.pipeline.units import Units
from dirotq.progress import track
from dirotq.quantize.tensors import site_file

T = TypeVar("T")
R = TypeVar("R")


def unfinished(
    sites: Iterable[Site], units: Units, folder: Path, load: Callable[[Site], R], what: str
) -> Iterator[tuple[Site, R]]:
    """Yield ``(site, load(site))``, in order, of every site whose file is not finished.

    The loop's body writes the site's file in ``folder`` (dirotq/quantize/tensors.py:save_site); it
    is finished, as the unit of the site's name, while the next site is computed.

    what  names the loop where its progress is shown
    """
    todo = units.todo(sites, lambda site: site.name, what)
    loaded = track(ahead(load, todo), what, total=len(todo))
    return units.finishing(loaded, lambda item: (item[0].name, folder / site_file(item[0].name)))


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
