"""Stages whose work is units that need nothing of each other: a site, a batch of prompts.

One process makes all units, or several share them out (pipeline/crew.py); the code of the stage is
the same, and so are the bytes.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.units import Made, Units
from dirotq.progress import track

log = logging.getLogger(__name__)

Inputs = Mapping[str, Artifact]
Make = Callable[[Iterable[str]], Iterator[Made]]
"""Makes the named units one after the other, and yields each one's name and files."""


@runtime_checkable
class Divided(Protocol):
    """A stage that says what its units are. Its ``run`` is :func:`in_units`.

    what     names the units where progress is shown
    units    ``units(**inputs)``: their names, in the order in which one process makes them
    maker    ``maker(out, names, **inputs)``: open whatever units are made from, once per process,
             and return the function that makes them under ``out``; ``names`` are all that are left,
             whoever makes them
    merge    ``merge(units, **inputs)``: what is to do when all units are there, in an order that
             does not depend on who made them; returns the stage's metrics
    """

    what: ClassVar[str]

    def units(self, **inputs: Any) -> Sequence[str]: ...
    def maker(self, out: Path, names: Sequence[str], **inputs: Any) -> Make: ...
    def merge(self, units: Units, **inputs: Any) -> Mapping[str, float]: ...


@runtime_checkable
class Followed(Divided, Protocol):
    """A divided stage with units of a second kind, made when those of the first are there."""

    def followed(self) -> "Chained": ...


class Chained(Divided, Protocol):
    """Work whose units need what came before them, and of each of which processes do parts.

    part  ``part(index, count, meeting)``: the share of one of ``count`` processes, which meet in
          the folder ``meeting``; only the last one's ``maker`` yields units. Raises NotShared
    """

    def part(self, index: int, count: int, meeting: Path) -> Divided: ...


class NotShared(Exception):
    """Why several processes can't do this together; this process does it alone then."""


FEW = 2
"""Units of which so few are to do are long, and tell of their progress themselves."""
Share = Callable[[Any, Units, Sequence[str], Inputs], Generator[str, None, None]]
"""Has the named units of a stage made, and yields their names as they are finished."""


def in_units(
    stage: Any, out: Path, inputs: Inputs, share: Share | None = None, chain: Share | None = None
) -> Mapping[str, float]:
    """Make the units of a divided stage that an earlier run did not finish, then merge all.

    share  makes them in other processes;  chain  those of its second kind; None: this one does
    """
    units = Units(out, stage)
    names, began = stage.units(**inputs), time.monotonic()
    _make(stage, units, names, inputs, share or _here)
    units.note_times(names, time.monotonic() - began)
    if isinstance(stage, Followed):
        second = stage.followed()
        follow = second.units(**inputs)
        try:
            _make(second, units, follow, inputs, chain or _here)
        except NotShared as reason:
            log.warning("%s: one process does it alone: %s", second.what, reason)
            _make(second, units, follow, inputs, _here)
    units.sweep()
    metrics = dict(stage.merge(units, **inputs))
    units.write_times()
    return metrics


def _make(stage: Any, units: Units, names: Sequence[str], inputs: Inputs, share: Share) -> None:
    todo = units.todo(names, str, stage.what)
    if todo:
        made = share(stage, units, todo, inputs)
        with contextlib.closing(made):  # nobody works on once this ends, whatever ends it
            for _ in track(made, stage.what, total=len(todo)) if len(todo) > FEW else made:
                pass
        units.flush()  # what is next may take long, or fail


def _here(
    stage: Any, units: Units, todo: Sequence[str], inputs: Inputs
) -> Generator[str, None, None]:
    return units.finishing(stage.maker(units.out, todo, **inputs)(todo))
